"""Kernels of the throughput policy: the best size of a batch's trees, and what any tree must gain."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.calibration import _estimate_kinds, _paths


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def least_rise(times: np.ndarray) -> float:
    """What each node more adds to a pass at least, of any size, as a share of a plain one; 1 where there is none."""
    least = np.inf if len(times) > 1 else 1.0
    for more in range(1, len(times)):
        least = min(least, (times[more] / times[0] - 1) / more)
    return least


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose(
    parents: np.ndarray,
    probability: np.ndarray,
    sizes: np.ndarray,
    weights: np.ndarray,
    accepted: np.ndarray,
    offered: np.ndarray,
    hoped: np.ndarray,
    hopes: np.ndarray,
    times: np.ndarray,
    drafting: float,
    plain: float,
    left: float,
    margin: float,
) -> tuple[np.ndarray, np.ndarray, int, float, float]:
    """The number of nodes per row for which tokens per second are most.

    Only numbers count by which no more than ``left`` may be lost, and that are worth it to the cautious: by
    ``accepted / offered`` they give ``margin`` times the tokens per second of none. Which is best is a matter of
    ``hoped / hopes``. Trees stand one behind another, ``sizes`` nodes of each.

    Returns:
        each node's kind, its rank in its tree by path probability, the root's being 0; then the number of nodes, and
        to the cautious tokens per second with so many and with none.
    """
    kinds, rank = np.empty(len(parents), np.int64), np.empty(len(parents), np.int64)
    tokens = np.ones((2, min(len(times), sizes.max())))  # to the cautious, and to the hopeful
    start = 0
    for row, size in enumerate(sizes):
        own = slice(start, start + size)
        kinds[own] = _estimate_kinds(parents[own], probability[own])
        cautious = _paths(parents[own], kinds[own], accepted, offered)
        hopeful = _paths(parents[own], kinds[own], hoped, hopes)
        likeliest = np.argsort(-hopeful, kind="mergesort")
        gained = np.zeros(2, np.float32)
        for n in range(1, max(tokens.shape[1], size)):
            if n < size:
                rank[start + likeliest[n]] = n
                gained[0] += cautious[likeliest[n]]
                gained[1] += hopeful[likeliest[n]]
            if n < tokens.shape[1]:
                tokens[0, n] += weights[row] * gained[0]
                tokens[1, n] += weights[row] * gained[1]
        rank[start] = 0
        start += size
    best, most, speeds = 0, 0.0, np.zeros(tokens.shape[1])
    for n in range(len(speeds)):
        seconds = drafting + times[n]
        if seconds - plain <= left * plain:
            speeds[n] = tokens[0, n] / seconds
            if tokens[1, n] / seconds > most and (n == 0 or speeds[n] > margin * speeds[0]):
                best, most = n, tokens[1, n] / seconds
    return kinds, rank, best, speeds[best], speeds[0]
