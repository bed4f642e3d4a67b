"""Kernel of drafters that learn how often guesses of each kind come true: what of a tree of guesses to draft."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.calibration import _paths
from specdec.trees.subtree_numba import prune, select

Limits = tuple[int, int, int, float]  # nodes, depth, width and least, as of a budget
Guess = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, parents and kinds
NO_GUESS: Guess = np.zeros(1, np.int64), np.full(1, -1), np.zeros(1, np.int64)  # a root that is never counted


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def likeliest(
    tokens: np.ndarray,
    parents: np.ndarray,
    kinds: np.ndarray,
    accepted: np.ndarray,
    offered: np.ndarray,
    limits: Limits,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The most probable part of a tree within ``limits``: tokens, parents and probability of each path.

    A node is accepted, once its parent is, as often as guesses of its kind were: ``accepted / offered``.
    """
    nodes, depth, width, least = limits
    probability = _paths(parents, kinds, accepted, offered)
    kept = prune(parents, probability, nodes, depth, width, np.float32(least))
    out: tuple[np.ndarray, np.ndarray, np.ndarray] = select(tokens, parents, probability, kept)
    return out
