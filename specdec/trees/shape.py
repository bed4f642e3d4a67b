"""A tree's shape, told by its parents alone: depths, positions, who is whose ancestor."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numba import njit


def depths(parents: Int[np.ndarray, " nodes"]) -> Int[np.ndarray, " nodes"]:
    """How many guesses lie between the root and each node: 0 for the root."""
    return positions(parents, 0)


def positions(parents: Int[np.ndarray, " nodes"], start: int) -> Int[np.ndarray, " nodes"]:
    """The position in the sequence that each node would take if its path were accepted; ``start`` for the root."""
    return cast(np.ndarray, _positions(parents, start))


def ancestor_words(parents: Int[np.ndarray, " nodes"]) -> UInt64[np.ndarray, "nodes words"]:
    """What each node may attend to, as bits: bit ``j % 64`` of word ``j // 64`` in row i iff j is i or its ancestor."""
    return cast(np.ndarray, _ancestor_words(parents))


def ancestor_matrix(parents: Int[np.ndarray, " nodes"]) -> Bool[np.ndarray, "nodes nodes"]:
    """What each node may attend to: True at [i, j] iff j is i or an ancestor of i."""
    return cast(np.ndarray, _ancestor_matrix(parents))


def lay_out(
    parents: Int[np.ndarray, " nodes"], depth: Int[np.ndarray, " width"], ancestors: Bool[np.ndarray, "width width"]
) -> None:
    """Write a tree's depths and what its nodes may attend to; rows behind it attend to themselves."""
    _lay_out(parents, depth, ancestors)


def is_chain(parents: Int[np.ndarray, " nodes"]) -> bool:
    """Whether every node follows the one before it, so that a plain causal mask is the tree's own."""
    return cast(bool, _is_chain(parents))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _positions(parents: np.ndarray, start: int) -> np.ndarray:
    out = np.empty(len(parents), np.int64)
    for node, parent in enumerate(parents):
        out[node] = start if parent < 0 else out[parent] + 1
    return out


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _ancestor_words(parents: np.ndarray) -> np.ndarray:
    out = np.zeros((len(parents), (len(parents) + 63) // 64), np.uint64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            out[node] = out[parent]
        out[node, node >> 6] |= np.uint64(1) << np.uint64(node & 63)
    return out


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _ancestor_matrix(parents: np.ndarray) -> np.ndarray:
    out = np.zeros((len(parents), len(parents)), np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            out[node, :node] = out[parent, :node]
        out[node, node] = True
    return out


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _lay_out(parents: np.ndarray, depth: np.ndarray, ancestors: np.ndarray) -> None:
    ancestors[:] = False
    for node in range(len(depth)):
        parent = parents[node] if node < len(parents) else -1
        if parent >= 0:
            depth[node] = depth[parent] + 1
            ancestors[node, :node] = ancestors[parent, :node]
        ancestors[node, node] = True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _is_chain(parents: np.ndarray) -> bool:
    for node, parent in enumerate(parents):  # noqa: SIM110 - a loop compiles, a generator does not
        if parent != node - 1:
            return False
    return True
