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
    times: np.ndarray,
    drafting: float,
    plain: float,
    left: float,
) -> tuple[np.ndarray, np.ndarray, int, float, float]:
    """The number of nodes per row for which tokens per second are most, among those by which no more may be lost.

    Trees stand one behind another, ``sizes`` nodes of each.

    Returns:
        each node's kind, its rank in its tree by path probability, the root's being 0; then the number of nodes, and
        tokens per second with so many and with none.
    """
    kinds, rank = np.empty(len(parents), np.int64), np.empty(len(parents), np.int64)
    tokens = np.ones(min(len(times), sizes.max()))
    start = 0
    for row, size in enumerate(sizes):
        own = slice(start, start + size)
        kinds[own] = _estimate_kinds(parents[own], probability[own])
        paths = _paths(parents[own], kinds[own], accepted, offered)
        likeliest = np.argsort(-paths, kind="mergesort")
        gained = np.float32(0)
        for n in range(1, max(len(tokens), size)):
            if n < size:
                rank[start + likeliest[n]] = n
                gained += paths[likeliest[n]]
            if n < len(tokens):
                tokens[n] += weights[row] * gained
        rank[start] = 0
        start += size
    best, speeds = 0, np.zeros(len(tokens))
    for n in range(len(tokens)):
        seconds = drafting + times[n]
        if seconds - plain <= left * plain:
            speeds[n] = tokens[n] / seconds
        if speeds[n] > speeds[best]:
            best = n
    return kinds, rank, best, speeds[best], speeds[0]
