"""Kernel of the union of trees."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def merge(
    tokens: np.ndarray, parents: np.ndarray, probability: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What ``union.merge`` does, of trees that stand one after the other, and which nodes several of them have."""
    n = len(tokens)
    out_tokens, out_parents, out_probability = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)
    origin, place, shared = np.empty(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.bool_)
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
            shared[node] |= origin[node] < tree
            place[i] = node
        start += length
    return out_tokens[:size], out_parents[:size], out_probability[:size], origin[:size], shared[:size]
