"""Trees drawn at random: distinct siblings, in the order and with the chances that their law says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from specdec import trees
from specdec.trees.sampling import beam_step, independent, stochastic_beam, without_replacement

from .enumerated import draws
from .sampling import grown, p_value, table

D = torch.tensor([0.1, 0.2, 0.3, 0.4])
NONE = torch.zeros(1, dtype=torch.float64)


def test_g7_the_first_step_of_a_beam():
    gumbel = torch.tensor([[0.3, -0.2, 0.9, 0.1]])
    beam, tokens, phi, psi = beam_step(D.log()[None], NONE, NONE, torch.exp(-gumbel), 4)
    assert beam.tolist() == [0] * 4
    assert tokens.tolist() == [2, 3, 1, 0]
    assert phi.tolist() == pytest.approx(D.double().log()[tokens].tolist())
    assert psi.tolist() == pytest.approx([0, -0.645459, -1.749510, -1.953446], abs=1e-6)


def test_a_beams_best_continuation_has_its_own_score():
    torch.manual_seed(0)
    phi, psi = torch.randn(6).double() - 30, torch.randn(6).double() - 2
    log_q = (20 * torch.randn(6, 50)).log_softmax(-1)
    beam, _, _, perturbed = beam_step(log_q, phi, psi, torch.empty(6, 50).exponential_(), 300)
    assert perturbed.isfinite().all()
    for i in range(6):
        assert perturbed[beam == i].max() == pytest.approx(float(psi[i]), abs=1e-9)
        assert (perturbed[beam == i] <= psi[i]).all()


def test_what_has_no_probability_is_not_kept():
    log_q = torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf, -0.7, -0.7]])
    beam, tokens, _, _ = beam_step(log_q, NONE.expand(2), NONE.expand(2), torch.ones(2, 3), 6)
    assert sorted(zip(beam.tolist(), tokens.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2)]


def families(tree):
    return [np.flatnonzero(tree.parents == node) for node in range(len(tree.tokens))]


GROWTHS = {
    "constant": lambda: without_replacement(0, (2, 2, 2)),
    "beam": lambda: stochastic_beam(0, 6, 5),
    "independent": lambda: independent(0, (3, 3)),
}


@pytest.mark.parametrize("name", GROWTHS)
def test_a_tree_is_sound_and_knows_its_law(name):
    torch.manual_seed(0)
    logits = table(vocab=12)
    logits[:, ::3] = -torch.inf
    for _ in range(20):
        tree = grown(GROWTHS[name](), lambda tokens: logits[tokens])
        n = len(tree.tokens)
        assert trees.fault(tree.tokens, tree.parents, np.ones(n, np.float32), 0, 12, n, 5, 6) is None
        assert not set(tree.tokens[1:].tolist()) & {0, 3, 6, 9}
        assert tree.q.shape == (n, 12)
        for node, children in enumerate(families(tree)):
            if len(children):
                torch.testing.assert_close(tree.q[node], logits[tree.tokens[node]].softmax(-1))
            for child in children:
                own = float(tree.q[node, tree.tokens[child]])
                assert tree.log_q[child] == pytest.approx(tree.log_q[node] + np.log(own), abs=1e-5)


def test_sizes():
    torch.manual_seed(0)
    logits = table(vocab=12)
    constant = grown(GROWTHS["constant"](), lambda tokens: logits[tokens])
    beam = grown(GROWTHS["beam"](), lambda tokens: logits[tokens])
    assert np.bincount(trees.depths(constant.parents)).tolist() == [1, 2, 4, 8]
    assert np.bincount(trees.depths(beam.parents)).tolist() == [1, 6, 6, 6, 6, 6]
    assert len(grown(without_replacement(0, (9,)), lambda _: torch.tensor([[0.0, 0.0, -torch.inf]])).tokens) == 3
    chain = grown(without_replacement(0, (1, 1, 1)), lambda tokens: logits[tokens])
    assert trees.is_chain(chain.parents)
    assert len(chain.tokens) == 4


def test_a_token_that_stops_the_drafter_has_no_children():
    dead = torch.full((4, 4), -torch.inf)
    dead[:, 1] = 0.0
    beam = grown(stochastic_beam(0, 4, 3), lambda tokens: dead[tokens])
    assert beam.tokens.tolist() == [0, 1, 1, 1]
    assert beam.log_q.tolist() == [0] * 4


def test_siblings_come_with_the_chances_of_the_draw():
    torch.manual_seed(0)
    chances = {tokens: weight for weight, tokens in draws(D, 2, "swor")}
    seen = dict.fromkeys(chances, 0)
    for _ in range(4000):
        seen[tuple(grown(without_replacement(0, (2,)), lambda _: D.log()[None]).tokens[1:].tolist())] += 1
    assert p_value(np.array(list(seen.values())), np.array(list(chances.values()))) > 0.01


def test_a_beam_draws_whole_paths_without_replacement():
    """The leaves of the last level, in their order, are a draw without replacement of all paths of that length."""
    torch.manual_seed(0)
    q = table(3, 3).softmax(-1)
    paths = list(itertools.product(range(3), repeat=2))
    mass = torch.tensor([float(q[0, a] * q[a, b]) for a, b in paths])
    chances = {pair: weight for weight, pair in draws(mass, 2, "swor")}
    seen = dict.fromkeys(chances, 0)
    for _ in range(4000):
        tree = grown(stochastic_beam(0, 2, 2), lambda tokens: q.log()[tokens])
        spelled = [(int(tree.tokens[tree.parents[leaf]]), int(tree.tokens[leaf])) for leaf in (-2, -1)]
        seen[tuple(map(paths.index, spelled))] += 1
    assert p_value(np.array(list(seen.values())), np.array(list(chances.values()))) > 0.01


def test_a_generator_makes_it_repeatable():
    logits = table(vocab=12)
    for growth in (without_replacement, independent):
        first, second = (
            grown(growth(0, (2, 2), torch.Generator().manual_seed(5)), lambda tokens: logits[tokens]) for _ in range(2)
        )
        assert first.tokens.tolist() == second.tokens.tolist()
