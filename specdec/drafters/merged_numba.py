"""Kernels of the merged drafter: which estimates are alike, and who agrees with whom."""

from __future__ import annotations

import numpy as np
from numba import njit

ODDS = 8  # conditional probabilities are told apart by odds, from 2**-8 to 2**8, a bucket for each factor of 2
DEPTHS = 4  # 1, 2, 3-4, 5 and more


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def estimate_kinds(parents: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Each node's odds once its parent is accepted, and its depth, as one number.

    An index of [2 * ODDS + 1, DEPTHS], flattened; not read for the root.
    """
    level, kinds = np.zeros(len(parents), np.int64), np.zeros(len(parents), np.int64)
    for node in range(1, len(parents)):
        parent = parents[node]
        level[node] = level[parent] + 1
        hit = max(probability[node], np.float32(1e-9))
        miss = max(probability[parent] - probability[node], np.float32(1e-9))
        bucket = np.int64(np.rint(min(max(np.log2(hit / miss), -ODDS), ODDS))) + ODDS
        depth = 3 if level[node] > 4 else 2 if level[node] > 2 else level[node] - 1
        kinds[node] = bucket * DEPTHS + depth
    return kinds


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
