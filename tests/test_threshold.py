"""When SpecDec++'s rule stops a guess, and that a sampled tree stays one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import specdec
from specdec import trees
from specdec.core import Context, DraftTree
from specdec.policies import ThresholdPolicy
from specdec.trees import sampling as growths
from specdec.verifiers import RejectionVerifier

from .sampling import SampledTrees, counts, law, model, p_value, table

CONTEXT = Context([1, 2, 3])


def chain(*chances):
    """A chain whose guesses are accepted with these chances, given the ones before."""
    return DraftTree.chain(3, range(len(chances)), np.cumprod(chances), "")


def length(policy, tree):
    return int(trees.depths(policy.trim([CONTEXT], [tree])[0].parents).max())


def test_g9_the_papers_rule_and_its_codes():
    tree = chain(0.95, 0.9, 0.8, 0.7, 0.7)
    assert length(ThresholdPolicy(0.3), tree) == 3  # 1 - .95 * .9 * .8 = .316
    assert length(ThresholdPolicy(0.3, lag=1), tree) == 4


def test_bounds():
    tree = chain(*[0.9] * 30)
    assert length(ThresholdPolicy(0.0, shortest=2), tree) == 2
    assert length(ThresholdPolicy(0.0), tree) == 1
    assert length(ThresholdPolicy(1.0, shortest=2), tree) == 20
    assert length(ThresholdPolicy(0.5, shortest=9, longest=12), tree) == 9
    assert length(ThresholdPolicy(0.9, longest=12), tree) == 12


def test_a_higher_threshold_guesses_no_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tree = chain(*rng.random(20) ** 0.3)
        lengths = [length(ThresholdPolicy(h, shortest=1), tree) for h in np.linspace(0, 1, 21)]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]


def test_the_oracles_threshold_beats_every_fixed_length():
    """Where chances are known, stopping by them gives more tokens per time than any one length."""
    rng = np.random.default_rng(0)
    texts = [chain(*np.where(rng.random(20) < 0.8, 0.97, 0.3)) for _ in range(400)]
    guess, whole = 0.15, 1.0

    def speed(lengths):
        tokens = [1 + tree.probability[1 : n + 1].sum() for tree, n in zip(texts, lengths, strict=True)]
        return sum(tokens) / sum(whole + guess * n for n in lengths)

    fixed = max(speed([n] * len(texts)) for n in range(21))
    stopped = max(speed([length(ThresholdPolicy(h), tree) for tree in texts]) for h in np.linspace(0, 1, 11))
    assert stopped > 1.05 * fixed


def test_siblings_stay_or_go_together():
    tokens, parents = np.arange(7), np.array([-1, 0, 0, 1, 1, 2, 2])
    probability = np.array([1, 0.9, 0.2, 0.8, 0.1, 0.1, 0.1], np.float32)
    q = torch.rand(7, 9)
    tree = DraftTree(tokens, parents, probability, ("",) * 7, q, "swor")
    (cut,) = ThresholdPolicy(0.5, width=2).trim([CONTEXT], [tree])
    assert cut.tokens.tolist() == [0, 1, 2, 3, 4]
    assert cut.law == "swor"
    assert torch.equal(cut.q, q[:5])


def test_drafters_may_stop_by_themselves_where_nothing_must_be_guessed():
    assert ThresholdPolicy(0.7).budget([CONTEXT])[0].least == pytest.approx(0.3)
    assert ThresholdPolicy(0.7, shortest=2).budget([CONTEXT])[0].least == 0
    assert ThresholdPolicy(0.7, lag=1).budget([CONTEXT])[0].least == pytest.approx(0.3)
    assert ThresholdPolicy(0.7, lag=2).budget([CONTEXT])[0].least == 0


@pytest.mark.parametrize(
    "bounds", [{"threshold": 1.1}, {"shortest": 3, "longest": 2}, {"longest": 0}, {"width": 0}, {"lag": -1}]
)
def test_bounds_out_of_order(bounds):
    with pytest.raises(ValueError, match="ThresholdPolicy"):
        ThresholdPolicy(**bounds)


class Sure(SampledTrees):
    """Estimates that a guess is accepted as often as it is drawn, which tells siblings apart."""

    def tree(self, root, depth):
        tree = super().tree(root, depth)
        own = [1.0, *(float(tree.q[p, t]) for p, t in zip(tree.parents[1:], tree.tokens[1:], strict=True))]
        path = np.array(own)
        for node in range(1, len(tree)):
            path[node] *= path[tree.parents[node]]
        return DraftTree(tree.tokens, tree.parents, path.astype(np.float32), tree.source, tree.q, tree.law)


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_the_output_keeps_the_targets_law(rule):
    """The length of a guess hangs on what was drawn, and the law of the output does not."""
    torch.manual_seed(0)
    target, prompt = model(), torch.tensor([[1, 2, 3]])
    drafter = Sure(lambda root, depth: growths.without_replacement(root, (1,) * depth), 2 * table())
    with specdec.speculating(target, drafter, ThresholdPolicy(0.5), RejectionVerifier(rule)):
        outputs = [target.generate(prompt.expand(100, -1), do_sample=True, max_new_tokens=4) for _ in range(5)]
        stats = specdec.stats(target)
    tokens = torch.cat(outputs)[:, 3:6]
    assert p_value(counts(tokens), law(target, prompt, 3)) > 0.01
    assert set(stats.by_rule) == {"match", rule}
    assert len(stats.acceptance_by_depth) > 1
