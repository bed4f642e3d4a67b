"""What may be wrong with a tree that somebody else drew."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int
from numba import njit

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_DTYPES = (("tokens", _INT64), ("parents", _INT64), ("probability", _FLOAT32))

_ROOT, _PARENT, _TOKEN, _PROBABILITY, _DEPTH, _WIDTH, _TWIN = range(1, 8)


def fault(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float32[np.ndarray, " nodes"],
    root_token: int,
    vocab: int,
    nodes: int,
    depth: int,
    width: int,
    twins: bool = False,
) -> str | None:
    """What is wrong with a tree, in words; None if it can be verified as it is.

    Args:
        tokens: of each node; wrong unless flat int64 from 0 to ``vocab - 1``.
        parents: of each node; wrong unless flat int64, -1 for node 0 and smaller than the node for every other.
        probability: of each path; wrong unless flat float32 from 0 to 1.
        root_token: the last committed token, which node 0 must carry.
        vocab: how many tokens there are.
        nodes: guessed nodes at most; the root does not count.
        depth: guessed tokens on one path at most.
        width: children of one node at most.
        twins: whether two of them may carry the same token, as independent draws may.
    """
    wrong = _wrong_arrays(tokens, parents, probability)
    if wrong:
        return wrong
    if len(tokens) - 1 > nodes:
        return f"{len(tokens) - 1} nodes are guessed, the budget is {nodes}"
    if tokens[0] != root_token:
        return f"the root's token is {tokens[0]}, the last committed one is {root_token}"
    code, node, other = _fault(tokens, parents, probability, vocab, depth, width, twins)
    if code == 0:
        return None
    return {
        _ROOT: f"the root's parent is {parents[0]}, not -1",
        _PARENT: f"node {node} has parent {parents[node]}, which does not come before it",
        _TOKEN: f"node {node} has token {tokens[node]}, the vocabulary ends at {vocab - 1}",
        _PROBABILITY: f"node {node} has probability {probability[node]}, not from 0 to 1",
        _DEPTH: f"node {node} is {depth + 1} deep, the budget is {depth}",
        _WIDTH: f"node {parents[node]} has more than {width} children, the budget's width",
        _TWIN: f"nodes {other} and {node} both guess token {tokens[node]} after node {parents[node]}",
    }[code]


def _wrong_arrays(*arrays: np.ndarray) -> str | None:
    for (name, dtype), array in zip(_DTYPES, arrays, strict=True):
        if type(array) is not np.ndarray:
            return f"{name} is a {type(array).__name__}, not a numpy array"
        if array.dtype != dtype:
            return f"{name} is {array.dtype}, not {dtype}"
        if array.ndim != 1:
            return f"{name} has shape {array.shape}, not one entry per node"
    tokens, parents, probability = map(len, arrays)
    if not tokens == parents == probability:
        return f"tokens, parents and probability have {tokens}, {parents} and {probability} entries, not as many each"
    return None if tokens else "there is no root: a tree has at least one node"


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fault(
    tokens: np.ndarray, parents: np.ndarray, probability: np.ndarray, vocab: int, depth: int, width: int, twins: bool
) -> tuple[int, int, int]:
    """What is wrong, with which node, and with which other; zeros if nothing is."""
    n = len(tokens)
    level, children = np.zeros(n, np.int64), np.zeros(n, np.int64)
    youngest, older = np.full(n, -1), np.full(n, -1)  # each node's last child, each child's elder sibling
    for node in range(n):
        parent = parents[node]
        if node == 0 and parent != -1:
            return _ROOT, 0, 0
        if node > 0 and not 0 <= parent < node:
            return _PARENT, node, 0
        if not 0 <= tokens[node] < vocab:
            return _TOKEN, node, 0
        if not 0 <= probability[node] <= 1:
            return _PROBABILITY, node, 0
        if node == 0:
            continue
        level[node] = level[parent] + 1
        if level[node] > depth:
            return _DEPTH, node, 0
        children[parent] += 1
        if children[parent] > width:
            return _WIDTH, node, 0
        twin = -1 if twins else youngest[parent]
        while twin >= 0 and tokens[twin] != tokens[node]:
            twin = older[twin]
        if twin >= 0:
            return _TWIN, node, twin
        older[node], youngest[parent] = youngest[parent], node
    return 0, 0, 0
