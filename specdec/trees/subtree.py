"""A part of a tree that is a tree again: which nodes to keep, and how they look once only they are left."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Float32, Int
from numba import njit


def prune(
    parents: Int[np.ndarray, " nodes"],
    probability: Float32[np.ndarray, " nodes"],
    nodes: int,
    depth: int,
    width: int,
    least: float,
) -> Int[np.ndarray, " kept"]:
    """The most probable part of a tree that a budget allows: ascending node indices, the root's among them.

    A path is no more probable than any part of it, so each node counts with the least probability on its path; then
    an ancestor never ranks behind its descendants and whatever is kept is a tree. Ties go to the lower index.

    Args:
        parents: of each node, parents first.
        probability: of each node's path; NaN is never kept.
        nodes: nodes kept at most, the root not counted.
        depth: guessed tokens on one path at most.
        width: children kept of one node at most.
        least: path probability, compared as float32, below which a node is dropped.
    """
    return cast(np.ndarray, _prune(parents, probability, nodes, depth, width, np.float32(least)))


def select(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float32[np.ndarray, " nodes"],
    kept: Int[np.ndarray, " kept"],
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " kept"], Float32[np.ndarray, " kept"]]:
    """Tokens, parents and probability of the sub-tree of the nodes ``kept``: ascending and closed under parents."""
    return tokens[kept], _renumber(parents, kept), probability[kept]


def below(parents: Int[np.ndarray, " nodes"], node: int) -> Int[np.ndarray, " kept"]:
    """A node and all its descendants: ascending node indices."""
    return cast(np.ndarray, _below(parents, node))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _below(parents: np.ndarray, node: int) -> np.ndarray:
    kept = np.zeros(len(parents), np.bool_)
    kept[node] = True
    for other in range(node + 1, len(parents)):
        kept[other] = kept[parents[other]]
    return np.flatnonzero(kept)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _prune(
    parents: np.ndarray, probability: np.ndarray, nodes: int, depth: int, width: int, least: np.float32
) -> np.ndarray:
    n = len(parents)
    path, level = _weakest(parents, probability)
    keep, children = np.zeros(n, np.bool_), np.zeros(n, np.int64)
    keep[0] = True
    left = nodes
    # Best first: parents come before their children and better siblings before worse ones, so one look at each
    # node is enough to know whether its parent is kept and whether there is room beside it. NaN sorts last.
    for node in np.argsort(-path, kind="mergesort"):
        if left <= 0 or not path[node] >= least:
            break
        parent = parents[node]
        if parent >= 0 and keep[parent] and level[node] <= depth and children[parent] < width:
            keep[node] = True
            children[parent] += 1
            left -= 1
    return np.flatnonzero(keep)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _weakest(parents: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least probability on each node's path, and its depth."""
    path, level = np.empty(len(parents), np.float32), np.zeros(len(parents), np.int64)
    for node, parent in enumerate(parents):
        path[node] = probability[node]
        if parent >= 0:
            path[node] = min(path[node], path[parent])
            level[node] = level[parent] + 1
    return path, level


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _renumber(parents: np.ndarray, kept: np.ndarray) -> np.ndarray:
    place, out = np.empty(len(parents), np.int64), np.empty(len(kept), np.int64)
    for new, old in enumerate(kept):
        place[old] = new
        out[new] = -1 if parents[old] < 0 else place[parents[old]]
    return out
