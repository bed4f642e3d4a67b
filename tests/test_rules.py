"""The rules of verification by exact enumeration: the output's law is the target's, whatever was drafted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from specdec.core import DraftTree
from specdec.kernels.residual import swor_step
from specdec.verifiers import rules

from .enumerated import drafts, joint, judge, outcomes, output, random_laws, spelled

SHAPES = {
    (1,): 4,
    (1, 1): 4,
    (2,): 4,
    (2, 1): 4,
    (1, 2): 4,
    (2, 2): 3,
    (1, 1, 1): 4,
    (3, 1): 3,
}  # and their vocabularies
RULES = {"match": rules.match, "recursive": rules.recursive, "traversal": rules.traversal}
SEEDS = range(2)
T, D = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()


def error(rule, shape, law, seed, target=None, drafter=None, change=lambda trees: trees):
    """How far the output's law is from the target's, and how many guesses are accepted."""
    vocab = SHAPES[shape]
    target, drafter = target or random_laws(seed, vocab), drafter or random_laws(seed + 100, vocab)
    wanted = joint(target, vocab, len(shape) + 1)
    got, accepted = output(rule, change(drafts(shape, drafter, law)), target, wanted)
    return float(np.abs(got - wanted).max()), accepted


@cache
def measured(name, shape, law, seed):
    """``error`` of a rule as it is."""
    return error(RULES[name], shape, law, seed)


@pytest.mark.parametrize("law", ["swor", "iid", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_output_has_the_targets_law(name, shape, law):
    assert max(measured(name, shape, law, seed)[0] for seed in SEEDS) < 1e-12


@pytest.mark.parametrize("law", ["swor", "iid", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_looking_ahead_accepts_no_less_than_walking_and_that_no_less_than_matching(shape, law):
    for seed in SEEDS:
        match, walk, ahead = (measured(name, shape, law, seed)[1] for name in RULES)
        assert match <= walk + 1e-12
        assert walk <= ahead + 1e-12


@pytest.mark.parametrize(
    ("shape", "vocab", "gain"),
    [((1, 1), 3, 0.844 / 0.793), ((2, 1), 3, 1.074 / 1.035), ((3, 1), 3, 1.639 / 1.601), ((2, 1, 1), 2, 2.322 / 2.171)],
)
def test_g25_looking_ahead_gains_a_few_percent(shape, vocab, gain):
    """Over six random pairs of laws, about as over six others; and nothing is lost on any of them."""
    accepted = []
    for seed in range(6):
        target, drafter = random_laws(seed, vocab), random_laws(seed + 100, vocab)
        trees, wanted = list(drafts(shape, drafter, "swor")), joint(target, vocab, len(shape) + 1)
        accepted.append([output(rule, trees, target, wanted)[1] for rule in (rules.recursive, rules.traversal)])
    walk, ahead = np.array(accepted).T
    assert (ahead >= walk - 1e-12).all()
    assert ahead.sum() / walk.sum() == pytest.approx(gain, abs=0.06)
    assert ahead.sum() > 1.005 * walk.sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["recursive", "traversal"])
def test_a_drafter_that_is_the_target_is_believed(name, shape):
    laws = random_laws(0, SHAPES[shape])
    wrong, accepted = error(RULES[name], shape, "swor", 0, laws, laws)
    assert wrong < 1e-12
    assert accepted == pytest.approx(len(shape))


@pytest.mark.parametrize("name", RULES)
def test_a_drafter_of_what_the_target_never_says_costs_nothing(name):
    halves = [lambda _, side=side: torch.tensor(side).double() for side in ([0.5, 0.5, 0, 0], [0, 0, 0.7, 0.3])]
    wrong, accepted = error(RULES[name], (2, 1), "swor", 0, *halves)
    assert (wrong < 1e-12, accepted) == (True, 0)


class TestCuts:
    """Which nodes may be left out of a sampled tree, and still leave it a sampled tree."""

    @staticmethod
    def cut(keep):
        def change(trees):
            for weight, tree in trees:
                kept = [0]
                for node in range(1, len(tree)):
                    if tree.parents[node] in kept and keep(tree, node):
                        kept.append(node)
                yield weight, replace(tree.take(np.array(kept)), q=tree.q[kept], law=tree.law)

        return change

    @staticmethod
    def own(tree, node):
        return float(tree.q[tree.parents[node], tree.tokens[node]])

    @pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 1, 1)], ids=str)
    @pytest.mark.parametrize("name", RULES)
    def test_a_node_may_stop_for_what_its_parent_is(self, name, shape):
        by_parent = self.cut(lambda tree, node: tree.parents[node] == 0 or self.own(tree, tree.parents[node]) > 0.3)
        assert max(error(RULES[name], shape, "swor", seed, change=by_parent)[0] for seed in SEEDS) < 1e-12

    @pytest.mark.parametrize("name", ["recursive", "traversal"])
    def test_but_not_for_what_it_is_itself(self, name):
        by_itself = self.cut(lambda tree, node: self.own(tree, node) > 0.3)
        assert max(error(RULES[name], (1, 1), "swor", seed, change=by_itself)[0] for seed in SEEDS) > 0.01
        assert max(error(rules.match, (1, 1), "swor", seed, change=by_itself)[0] for seed in SEEDS) < 1e-12

    @pytest.mark.parametrize("name", ["recursive", "traversal"])
    def test_nor_may_a_tree_be_chosen_with_hindsight(self, name):
        """Trees that stay whole are no plain draws where others went for what they held."""

        def chosen(trees):
            for weight, tree in trees:
                likely = self.own(tree, 1) > 0.3
                yield weight, tree if likely else tree.take(np.zeros(1, np.int64))

        assert max(error(RULES[name], (1,), "swor", seed, change=chosen)[0] for seed in SEEDS) > 0.01


def unnormalised(patch):
    """After a rejection the drafter's law goes on as it was."""
    patch.setattr(rules, "_next_law", lambda tree, q, x: q)


def resampled_from_the_target(patch):
    """After a rejection the target draws from its own law, not from what is left of it."""
    patch.setattr(rules, "_residual", lambda p, q, alpha: (p, float((alpha * p - q).clamp(min=0).sum())))


def by_token(patch):
    """Siblings are tried in order of their tokens, not of their draw."""
    children = rules._children
    patch.setattr(rules, "_children", lambda tree: [sorted(c, key=tree.tokens.__getitem__) for c in children(tree)])


def before_warpers(trees):
    for weight, tree in trees:
        q = tree.q.sqrt()
        yield weight, replace(tree, q=q / q.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", ["recursive", "traversal"])
class TestMutations:
    """Rules that are broken on purpose do not pass."""

    @pytest.mark.parametrize("broken", [unnormalised, resampled_from_the_target, by_token])
    def test_broken(self, name, broken, monkeypatch):
        broken(monkeypatch)
        assert max(error(RULES[name], (2,), "swor", seed)[0] for seed in range(6)) > 0.01

    def test_a_nodes_index_taken_for_its_token(self, name):
        def mistaken(tree, chance):
            return RULES[name](replace(tree, tokens=np.arange(len(tree)) % 4), chance)

        assert max(error(mistaken, (2,), "swor", seed)[0] for seed in range(6)) > 0.01

    def test_a_drafters_law_before_its_warpers(self, name):
        assert max(error(RULES[name], (2,), "swor", seed, change=before_warpers)[0] for seed in range(6)) > 0.01

    def test_distinct_siblings_taken_for_independent_ones(self, name):
        def mistaken(trees):
            return ((weight, replace(tree, law="iid")) for weight, tree in trees)

        assert max(error(RULES[name], (2,), "swor", seed, change=mistaken)[0] for seed in range(6)) > 0.01


class TestGolden:
    """Figures computed by hand: T = (.4, .3, .2, .1), D = (.1, .2, .3, .4) in every context."""

    @staticmethod
    def tree(tokens, parents, law="swor"):
        n = len(tokens) + 1
        arrays = np.array([0, *tokens]), np.array([-1, *parents]), np.ones(n, np.float32)
        return DraftTree(*arrays, ("",) * n, D.expand(n, 4), law)

    def outcomes(self, rule, tree):
        """Probability by number of accepted guesses, and of each last token."""
        lengths, last = np.zeros(len(tree)), {}
        for weight, (length, tokens) in outcomes(lambda chance: judge(rule, tree, lambda _: T, chance)):
            lengths[length] += weight
            last.setdefault(length, np.zeros(4))[tokens[-1]] += weight
        return lengths, {length: law / law.sum() for length, law in last.items()}

    def accepted(self, rule, shape, law):
        trees = drafts(shape, lambda _: D, law)
        return output(rule, trees, lambda _: T, joint(lambda _: T, 4, len(shape) + 1))[1]

    @pytest.mark.parametrize("rule", [rules.recursive, rules.traversal])
    def test_g1_one_guess(self, rule):
        assert self.accepted(rule, (1,), "iid") == pytest.approx(0.6)
        _, last = self.outcomes(rule, self.tree([3], [0]))
        assert last[0] == pytest.approx([0.75, 0.25, 0, 0])

    def test_g2_siblings_without_replacement(self):
        seen, tried = [], []

        class Sees(rules.Drawn):
            def accept(self, probability):
                tried.append(probability)
                return False

            def token(self, weights):
                seen.append(weights.tolist())
                return 0

        judge(rules.recursive, self.tree([3, 2, 1], [0, 0, 0]), lambda _: T, Sees())
        assert tried == pytest.approx([0.25, 0, 0])
        assert seen == [pytest.approx([1, 0, 0, 0])]

    @pytest.mark.parametrize(
        ("law", "chances"), [("swor", [0.6, 0.764286, 0.840298, 1]), ("iid", [0.6, 0.72, 0.768, 0.7912])]
    )
    def test_g3_several_children(self, law, chances):
        for k, chance in enumerate(chances, 1):
            assert self.accepted(rules.recursive, (k,), law) == pytest.approx(chance, abs=1e-6)

    def test_g4_chosen_children(self):
        lengths, last = self.outcomes(rules.match, self.tree([3, 2], [0, 0], None))
        assert lengths == pytest.approx([0.7, 0.3, 0])
        assert last[0] == pytest.approx([4 / 7, 3 / 7, 0, 0])

    def test_g5_block_verification(self):
        lengths, last = self.outcomes(rules.traversal, self.tree([3, 2, 0], [0, 1, 2]))
        assert lengths == pytest.approx([1 / 3, 0, 0, 2 / 3])
        assert last[0] == pytest.approx([0.75, 0.25, 0, 0])
        assert self.outcomes(rules.recursive, self.tree([3, 2, 0], [0, 1, 2]))[0][3] == pytest.approx(1 / 6)
        lengths, last = self.outcomes(rules.traversal, self.tree([0, 3, 2], [0, 1, 2]))
        assert lengths == pytest.approx([0, 5 / 6, 0, 1 / 6])
        assert last[1] == pytest.approx([0.75, 0.25, 0, 0])

    def test_g6_traversal(self):
        lengths, last = self.outcomes(rules.traversal, self.tree([3, 1], [0, 0]))
        assert lengths == pytest.approx([0.75 * 0.25, 0.25 + 0.75 * 0.75, 0])
        assert last[0] == pytest.approx([1, 0, 0, 0])

    def test_block_verification_by_its_own_formula(self):
        """Expected accepted tokens of a chain of two: 11/9 where speculative sampling has 10/9."""
        t, d = torch.tensor([1 / 3, 2 / 3]).double(), torch.tensor([2 / 3, 1 / 3]).double()
        wanted = joint(lambda _: t, 2, 3)
        for rule, accepted in ((rules.recursive, 10 / 9), (rules.traversal, 11 / 9)):
            got = output(rule, drafts((1, 1), lambda _: d, "iid"), lambda _: t, wanted)
            assert got[1] == pytest.approx(accepted)

    @pytest.mark.parametrize("seed", range(5))
    def test_traversal_of_a_chain_is_block_verification(self, seed):
        target, drafter = random_laws(seed, 4), random_laws(seed + 100, 4)
        for _, tree in drafts((1, 1, 1), drafter, "iid"):
            lengths = np.zeros(4)
            for weight, (length, _) in outcomes(lambda chance, tree=tree: judge(rules.traversal, tree, target, chance)):
                lengths[length] += weight
            assert lengths == pytest.approx(block_lengths(tree, target), abs=1e-12)


def block_lengths(tree, target):
    """How many guesses block verification keeps of a chain, by the formula of its paper."""
    n = len(tree) - 1
    p, keeps = 1.0, []
    for i in range(1, n + 1):
        x, before, after = int(tree.tokens[i]), target(spelled(tree, i - 1)), target(spelled(tree, i))
        p = min(1.0, p * float(before[x] / tree.q[i - 1, x]))
        left = float((p * after - tree.q[i]).clamp(min=0).sum())
        keeps.append(p if i == n else 1.0 if left + 1 - p == 0 else left / (left + 1 - p))
    lengths, rest = np.zeros(n + 1), 1.0
    for i in range(n, 0, -1):
        lengths[i], rest = rest * keeps[i - 1], rest * (1 - keeps[i - 1])
    lengths[0] = rest
    return lengths


@pytest.mark.parametrize("seed", range(5))
def test_a_sibling_is_judged_as_by_the_kernel(seed):
    """``swor_step`` judges one sibling of many rows at once; the recursive rule does the same one by one."""
    p, q = random_laws(seed, 4)(()), random_laws(seed + 100, 4)(())
    x = int(q.argmax())
    ps, qs = p[None].clone(), q[None].clone()
    swor_step(ps, qs, torch.tensor([x]), torch.tensor([1.0]).double())
    if rules._ratio(p, q, x) < 1:
        assert rules._residual(p, q, 1.0)[0].tolist() == pytest.approx(ps[0].tolist())
        tree = TestGolden.tree([x], [0])
        assert rules._next_law(tree, q, x).tolist() == pytest.approx(qs[0].tolist())
