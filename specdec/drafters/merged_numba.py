"""Kernel of the merged drafter: who agrees with whom."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def mark_shared(
    tokens: np.ndarray,
    parents: np.ndarray,
    origin: np.ndarray,
    part: int,
    part_tokens: np.ndarray,
    part_parents: np.ndarray,
    shared: np.ndarray,
) -> None:
    """Set ``shared`` at the union's nodes that tree ``part`` guesses too, and an earlier one guessed first."""
    place = np.zeros(len(part_tokens), np.int64)
    for i in range(1, len(part_tokens)):
        parent = place[part_parents[i]]
        node = parent + 1
        while parents[node] != parent or tokens[node] != part_tokens[i]:
            node += 1
        place[i] = node
        shared[node] |= origin[node] < part
