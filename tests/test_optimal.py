"""The best shape of a tree, against dynamic programming and against counting."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from specdec import trees
from specdec.trees.optimal import fastest_shape, optimal_shape

P = np.array([0.7, 0.15, 0.08, 0.03])


def most(acceptance, nodes, depth):
    """Sequoia's dynamic programme: the most expected tokens of ``nodes`` nodes."""

    @cache
    def best(m, level):
        return max((exactly(m, level, b) for b in range(min(m, len(acceptance) + 1))), default=-np.inf)

    @cache
    def exactly(m, level, children):
        if children == 0:
            return 1.0 if m == 1 else -np.inf
        if level == 0:
            return -np.inf
        p = acceptance[children - 1]
        return max((exactly(y, level, children - 1) + p * best(m - y, level - 1) for y in range(1, m)), default=-np.inf)

    return best(nodes, depth)


@pytest.mark.parametrize(("nodes", "tokens"), [(2, 1.7), (4, 2.533), (8, 3.19617), (16, 3.76512), (24, 4.1091)])
def test_g19(nodes, tokens):
    """Six levels, the root's among them."""
    assert optimal_shape(P, nodes, 5).values.sum() == pytest.approx(tokens, abs=5e-6)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_dynamic_programming_finds(seed):
    rng = np.random.default_rng(seed)
    acceptance = np.sort(rng.dirichlet(np.ones(4)))[:0:-1]
    for nodes in (1, 2, 5, 9, 14):
        for depth in (1, 2, 4):
            shape = optimal_shape(acceptance, nodes, depth)
            assert shape.values.sum() == pytest.approx(most(tuple(acceptance), len(shape.values), depth))
            assert len(shape.values) == min(nodes, sum(3**d for d in range(depth + 1)))


def test_it_is_a_tree_of_whole_families():
    shape = optimal_shape(P, 40, 5)
    assert trees.depths(shape.parents).max() <= 5
    assert (shape.parents[1:] < np.arange(1, 40)).all()
    for node in range(40):
        assert sorted(shape.ranks[shape.parents == node]) == list(range((shape.parents == node).sum()))
        if node:
            assert shape.values[node] == pytest.approx(shape.values[shape.parents[node]] * P[shape.ranks[node]])
    assert (np.diff(shape.values) <= 1e-12).all()


@pytest.mark.parametrize(("rate", "guesses", "tokens"), [(0.8, 4, 3.3616), (0.9, 6, 5.217031)])
def test_g15_a_chain(rate, guesses, tokens):
    shape = optimal_shape(np.array([rate]), guesses + 1, guesses)
    assert trees.is_chain(shape.parents)
    assert shape.values.sum() == pytest.approx((1 - rate ** (guesses + 1)) / (1 - rate))
    assert shape.values.sum() == pytest.approx(tokens, abs=1e-6)


def test_g16_speedup_where_passes_cost_the_same():
    """2.5 tokens per step, three levels, drafting at 0.016 passes a level: 2.3855 times as fast as without."""
    rate = next(float(root.real) for root in np.roots([1, 1, 1, -1.5]) if abs(root.imag) < 1e-12)
    shape, speed = fastest_shape(np.array([rate]), np.array([1.0, np.inf, np.inf, 1.0]), 0.016, 3)
    assert (len(shape.values), shape.values.sum()) == (4, pytest.approx(2.5))
    assert speed == pytest.approx(2.3855, abs=5e-5)


def test_the_fastest_is_the_best_of_all():
    passes, level = 1 + 0.02 * np.arange(32.0), 0.1
    shape, speed = fastest_shape(P, passes, level, 6)
    tried = {
        (n, d): optimal_shape(P, n, d).values.sum() / (d * level + passes[n - 1])
        for d in range(7)
        for n in range(1, 33 if d else 2)
        if len(optimal_shape(P, n, d).values) == n
    }
    best = max(tried, key=tried.__getitem__)
    assert speed == pytest.approx(tried[best])
    assert len(shape.values) == best[0]
    assert trees.depths(shape.parents).max() <= best[1]


def test_it_follows_the_cost_curve():
    flat, _ = fastest_shape(P, np.ones(64), 0.01, 8)
    steep, _ = fastest_shape(P, 1 + 0.2 * np.arange(64.0), 0.01, 8)
    useless, speed = fastest_shape(P, 1.0 + np.arange(64.0), 1.0, 8)
    assert len(flat.values) == 64
    assert 1 < len(steep.values) < 16
    assert (len(useless.values), speed) == (1, 1.0)


def test_what_is_no_chance_is_refused():
    for nodes, acceptance in ((0, P), (4, [0.9, 0.2]), (4, [-0.1, 0.2]), (4, [np.nan])):
        with pytest.raises(ValueError, match="sum to <= 1"):
            optimal_shape(np.array(acceptance), nodes, 3)
