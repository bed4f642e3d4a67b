"""Kernels of the merged drafter: the union of its parts' trees, and what came true of them."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.calibration import KINDS, MOST, _estimate_kinds, _paths, learn
from specdec.drafters.likeliest_numba import Limits
from specdec.trees.path import _follow
from specdec.trees.subtree_numba import prune, select
from specdec.trees.union_numba import merge

TOKENS, PARENTS, KIND = range(3)  # rows of a guess: some trees one after the other, each from a parent of -1 on


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def unite(
    nodes: np.ndarray, probability: np.ndarray, accepted: np.ndarray, offered: np.ndarray, limits: Limits
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The union of some trees, calibrated before and after, and what of it is within ``limits``.

    A node's probability, given its parent, is how often others of its kind were accepted. The i-th tree has the i-th
    ``KINDS`` of kinds; the union has the last 2 * ``KINDS``, first what one tree guesses, then what several do.

    Args:
        nodes: int64; the trees' tokens one after the other, then their parents.
        probability: of each path, as each tree estimates it.
        accepted, offered: per kind.

    Returns:
        The guess, which is all trees and last their union: int64 [3, nodes]. Then tokens, parents, probability and
        first tree of each node within ``limits``.
    """
    n = len(probability)
    tokens, parents = nodes[:n], nodes[n:]
    starts = np.append(np.flatnonzero(parents < 0), n)
    kinds, calibrated = np.empty(n, np.int64), np.empty(n, np.float32)
    for tree in range(len(starts) - 1):
        part = slice(starts[tree], starts[tree + 1])
        kinds[part] = _estimate_kinds(parents[part], probability[part]) + tree * KINDS
        calibrated[part] = _paths(parents[part], kinds[part], accepted, offered)
    sizes = np.diff(starts)
    union, above, best, origin, shared = merge(tokens, parents, calibrated, sizes)
    origin[0] = np.argmax(sizes > 1)  # the root is in all, but not all guess
    alike = _estimate_kinds(above, best) + (len(starts) - 1 + shared) * KINDS
    guess = np.empty((3, n + len(union)), np.int64)
    guess[TOKENS, :n], guess[PARENTS, :n], guess[KIND, :n] = tokens, parents, kinds
    guess[TOKENS, n:], guess[PARENTS, n:], guess[KIND, n:] = union, above, alike
    paths = _paths(above, alike, accepted, offered)
    kept = prune(above, paths, limits[0], limits[1], limits[2], np.float32(limits[3]))
    out_tokens, out_parents, out_probability = select(union, above, paths, kept)
    return guess, out_tokens, out_parents, out_probability, origin[kept]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def settle(guess: np.ndarray, committed: np.ndarray, accepted: np.ndarray, offered: np.ndarray) -> np.ndarray:
    """Count what came true of each tree of a guess; how many of the ``committed`` tokens each had on one path."""
    starts = np.append(np.flatnonzero(guess[PARENTS] < 0), guess.shape[1])
    matched = np.empty(len(starts) - 1, np.int64)
    for tree in range(len(matched)):
        part = slice(starts[tree], starts[tree + 1])
        tokens, parents, kinds = guess[TOKENS, part], guess[PARENTS, part], guess[KIND, part]
        learn(tokens, parents, kinds, committed, accepted, offered, MOST)
        matched[tree] = len(_follow(tokens, parents, committed)) - 1
    return matched
