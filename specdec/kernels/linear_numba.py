"""A matrix product for few rows on the CPU: every weight is read from memory once, whatever the number of rows.

For one row a product is nothing but reading the weights; general libraries turn to a blocked algorithm at two rows,
which costs as much for two as for sixteen. Here each thread walks down its own outputs' weights in order, and holds
all rows' sums in registers: one output at a time for up to four rows, else tiles of four outputs by four rows, whose
weights stay in the nearest cache while the other rows pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, njit, prange, set_num_threads

if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"  # numba's own would abort the process where two threads call at once

FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; but NaN and infinity keep their meaning


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _outputs1_rows1(x: Any, w: Any, y: Any, n: int, o: int) -> None:
    a = np.float32(0)
    for k in range(w.shape[1]):
        a += w[o, k] * x[n, k]
    y[n, o] = a


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _outputs1_rows2(x: Any, w: Any, y: Any, n: int, o: int) -> None:
    a, b = np.float32(0), np.float32(0)
    for k in range(w.shape[1]):
        v = w[o, k]
        a += v * x[n, k]
        b += v * x[n + 1, k]
    y[n, o], y[n + 1, o] = a, b


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _outputs1_rows4(x: Any, w: Any, y: Any, n: int, o: int) -> None:
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(w.shape[1]):
        v = w[o, k]
        a += v * x[n, k]
        b += v * x[n + 1, k]
        c += v * x[n + 2, k]
        d += v * x[n + 3, k]
    y[n, o], y[n + 1, o], y[n + 2, o], y[n + 3, o] = a, b, c, d


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _outputs4_rows4(x: Any, w: Any, y: Any, n: int, o: int) -> None:
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    b0, b1, b2, b3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    c0, c1, c2, c3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    d0, d1, d2, d3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(w.shape[1]):
        w0, w1, w2, w3 = w[o, k], w[o + 1, k], w[o + 2, k], w[o + 3, k]
        v = x[n, k]
        a0 += w0 * v
        a1 += w1 * v
        a2 += w2 * v
        a3 += w3 * v
        v = x[n + 1, k]
        b0 += w0 * v
        b1 += w1 * v
        b2 += w2 * v
        b3 += w3 * v
        v = x[n + 2, k]
        c0 += w0 * v
        c1 += w1 * v
        c2 += w2 * v
        c3 += w3 * v
        v = x[n + 3, k]
        d0 += w0 * v
        d1 += w1 * v
        d2 += w2 * v
        d3 += w3 * v
    y[n, o], y[n, o + 1], y[n, o + 2], y[n, o + 3] = a0, a1, a2, a3
    y[n + 1, o], y[n + 1, o + 1], y[n + 1, o + 2], y[n + 1, o + 3] = b0, b1, b2, b3
    y[n + 2, o], y[n + 2, o + 1], y[n + 2, o + 2], y[n + 2, o + 3] = c0, c1, c2, c3
    y[n + 3, o], y[n + 3, o + 1], y[n + 3, o + 2], y[n + 3, o + 3] = d0, d1, d2, d3


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _one_output(x: Any, w: Any, y: Any, first: int, o: int) -> None:
    """Rows from ``first`` on of one output."""
    n, rows = first, x.shape[0]
    while n + 4 <= rows:
        _outputs1_rows4(x, w, y, n, o)
        n += 4
    if n + 2 <= rows:
        _outputs1_rows2(x, w, y, n, o)
        n += 2
    if n < rows:
        _outputs1_rows1(x, w, y, n, o)


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _four_outputs(x: Any, w: Any, y: Any, o: int) -> None:
    """All rows of outputs ``o`` to ``o + 3``, of which the last few may not exist."""
    tiled = x.shape[0] // 4 * 4 if x.shape[0] > 4 and o + 4 <= w.shape[0] else 0
    for n in range(0, tiled, 4):
        _outputs4_rows4(x, w, y, n, o)
    for output in range(o, min(o + 4, w.shape[0])):
        _one_output(x, w, y, tiled, output)


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def _threaded(x: Any, w: Any, y: Any) -> None:
    for block in prange((w.shape[0] + 3) // 4):
        _four_outputs(x, w, y, 4 * block)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _alone(x: Any, w: Any, y: Any) -> None:
    for block in range((w.shape[0] + 3) // 4):
        _four_outputs(x, w, y, 4 * block)


def linear(x: np.ndarray, weight: np.ndarray, y: np.ndarray, threads: int) -> None:
    """``y = x @ weight.T``: x [rows, inputs], weight [outputs, inputs], y [rows, outputs], float32 and contiguous."""
    if threads == 1:
        _alone(x, weight, y)
        return
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    _threaded(x, weight, y)
