"""Kernel of the recycling drafter: a tree grown by the rates that were learnt."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.drafters.likeliest_numba import Limits
from specdec.trees.growth import _grow


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def unfold(
    matrix: np.ndarray, accepted: np.ndarray, offered: np.ndarray, root: int, limits: Limits
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``trees.grow_adjacency`` grows within ``limits``, where ranks are accepted as often as they were.

    ``accepted`` and ``offered`` are [levels * k], the last level for all that are deeper.
    """
    rate = np.minimum(1.0, accepted / offered).astype(np.float32).reshape(-1, matrix.shape[1])
    nodes, depth, width, least = limits
    grown: tuple[np.ndarray, np.ndarray, np.ndarray] = _grow(matrix, rate, root, nodes, depth, width, np.float32(least))
    return grown
