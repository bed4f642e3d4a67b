"""Ancestor bits on the CPU: each node copies its parent's words and adds its own bit."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def ancestors(parents: np.ndarray) -> np.ndarray:
    """Words [rows, nodes, words] of int64 parents [rows, nodes]."""
    rows, nodes = parents.shape
    out = np.zeros((rows, nodes, (nodes + 63) // 64), np.int64)
    for row in range(rows):
        for node in range(nodes):
            parent = parents[row, node]
            if parent >= 0:
                out[row, node] = out[row, parent]
            out[row, node, node >> 6] |= np.int64(1) << np.int64(node & 63)
    return out
