"""Paths through a tree: from the root down, as far as tokens agree.

Every walk is one scan of the nodes: a child always stands after its parent, so nothing before the node just reached
can be its child.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Int
from numba import njit


def child(tokens: Int[np.ndarray, " nodes"], parents: Int[np.ndarray, " nodes"], node: int, token: int) -> int:
    """The child of ``node`` that guesses ``token``, or -1."""
    return cast(int, _child(tokens, parents, node, token))


def follow(
    tokens: Int[np.ndarray, " nodes"], parents: Int[np.ndarray, " nodes"], continuation: Int[np.ndarray, " length"]
) -> Int[np.ndarray, " accepted"]:
    """The nodes, root first, whose tokens spell ``continuation`` as far as the tree knows it.

    The continuation starts after the root's own token, so the path is one longer than what was matched.
    """
    return cast(np.ndarray, _follow(tokens, parents, continuation))


def greedy_path(
    tokens: Int[np.ndarray, " nodes"], parents: Int[np.ndarray, " nodes"], choices: Int[np.ndarray, " nodes"]
) -> Int[np.ndarray, " accepted"]:
    """The nodes, root first, that a target accepts which chooses ``choices[node]`` after each node."""
    return cast(np.ndarray, _greedy_path(tokens, parents, choices))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _child(tokens: np.ndarray, parents: np.ndarray, node: int, token: int) -> int:
    for candidate in range(max(node, 0) + 1, len(parents)):
        if parents[candidate] == node and tokens[candidate] == token:
            return candidate
    return -1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _follow(tokens: np.ndarray, parents: np.ndarray, continuation: np.ndarray) -> np.ndarray:
    path = np.zeros(min(len(tokens), len(continuation) + 1), np.int64)
    matched = 0
    for node in range(1, len(tokens)):
        if matched == len(continuation):
            break
        if parents[node] == path[matched] and tokens[node] == continuation[matched]:
            matched += 1
            path[matched] = node
    return path[: matched + 1]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _greedy_path(tokens: np.ndarray, parents: np.ndarray, choices: np.ndarray) -> np.ndarray:
    path = np.zeros(len(tokens), np.int64)
    matched = 0
    for node in range(1, len(tokens)):
        last = path[matched]
        if parents[node] == last and tokens[node] == choices[last]:
            matched += 1
            path[matched] = node
    return path[: matched + 1]
