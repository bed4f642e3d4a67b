"""Kernels of sub-trees: which nodes to keep, and how they look then."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def below(parents: np.ndarray, node: int) -> np.ndarray:
    """What ``subtree.below`` does."""
    kept = np.zeros(len(parents), np.bool_)
    kept[node] = True
    for other in range(node + 1, len(parents)):
        kept[other] = kept[parents[other]]
    return np.flatnonzero(kept)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def prune(
    parents: np.ndarray, probability: np.ndarray, nodes: int, depth: int, width: int, least: np.float32
) -> np.ndarray:
    """What ``subtree.prune`` does."""
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
def select(
    tokens: np.ndarray, parents: np.ndarray, probability: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``subtree.select`` does."""
    return tokens[kept], _renumber(parents, kept), probability[kept]


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
