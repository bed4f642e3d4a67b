"""Several drafters' trees as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float32, Int
from numba import njit

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def merge(
    trees: Sequence[Arrays],
) -> tuple[
    Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Float32[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]
]:
    """The union of trees with one root: every path that some tree guesses, each once.

    A path that several trees guess has the largest of their probabilities. The first tree's nodes come first and in
    their own order, then what each later tree adds.

    Args:
        trees: ``(tokens, parents, probability)`` of each.

    Returns:
        tokens, parents, probability and, for each node, the index of the first tree that has it.

    Raises:
        ValueError: there is no tree, or two have different root tokens.
    """
    roots = {int(tokens[0]) for tokens, _, _ in trees}
    if len(roots) != 1:
        raise ValueError(f"merge needs trees with one root token, got {len(trees)} trees with roots {sorted(roots)}")
    tokens, parents, probability = (np.concatenate(arrays) for arrays in zip(*trees, strict=True))
    sizes = np.array([len(tree[0]) for tree in trees])
    return cast(tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], _merge(tokens, parents, probability, sizes))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _merge(
    tokens: np.ndarray, parents: np.ndarray, probability: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n = len(tokens)
    out_tokens, out_parents, out_probability = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)
    origin, place = np.empty(n, np.int64), np.zeros(n, np.int64)
    youngest, older = np.full(n, -1), np.full(n, -1)  # each node's last child, each child's elder sibling
    out_tokens[0], out_parents[0], out_probability[0], origin[0] = tokens[0], -1, probability[0], 0
    size, start = 1, 0
    for tree, length in enumerate(sizes):
        for i in range(start, start + length):
            node, parent = 0, -1
            if i > start:
                parent = place[start + parents[i]]
                node = youngest[parent]
                while node >= 0 and out_tokens[node] != tokens[i]:
                    node = older[node]
            if node < 0:
                node, size = size, size + 1
                out_tokens[node], out_parents[node], out_probability[node] = tokens[i], parent, probability[i]
                origin[node], older[node], youngest[parent] = tree, youngest[parent], node
            out_probability[node] = max(out_probability[node], probability[i])
            place[i] = node
        start += length
    return out_tokens[:size], out_parents[:size], out_probability[:size], origin[:size]
