"""A matrix product for few rows on the CPU: every weight is read from memory once, whatever the number of rows.

For one row a product is nothing but reading the weights; general libraries turn to a blocked algorithm at two rows,
which costs as much for two as for sixteen. Here each thread walks down its own outputs' weights in order, a few
outputs at a time: these stay in the nearest cache while all rows pass by in tiles, and meanwhile the next ones are
fetched. So the time is the longer of reading and multiplying, not their sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads

from specdec.kernels.tile_numba import LANES, OUTPUTS, ROWS, tile

if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"  # numba's own would abort the process where two threads call at once

LONGEST = 1024  # inputs at a time: of more, a few outputs' weights do not stay in the nearest cache for all tiles


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def product(
    w: int, w_stride: int, x: int, x_stride: int, y: int, y_stride: int, rows: int, inputs: int, outputs: int
) -> None:
    """``y = x @ w.T`` in this thread, of matrices given by address and stride in float32 numbers."""
    tiles = (rows + ROWS - 1) // ROWS
    lines = 4 if tiles <= 2 else 2  # more turns, fewer lines in each: all that the next outputs need is fetched
    cuts = 1 if tiles == 1 else (inputs + LONGEST - 1) // LONGEST
    o = 0
    while o < outputs:
        some = OUTPUTS if rows > 1 and o + OUTPUTS <= outputs else 1
        ahead, begin = w + 4 * w_stride * (o + OUTPUTS), 0
        for cut in range(cuts):
            end = inputs if cut == cuts - 1 else inputs * (cut + 1) // cuts // LANES * LANES
            n = 0
            for t in range(tiles):
                height = (rows - n + tiles - t - 1) // (tiles - t)
                at = w + 4 * (w_stride * o + begin), x + 4 * (x_stride * n + begin), y + 4 * (y_stride * n + o)
                tile(
                    some,
                    height,
                    lines if some > 1 else 1,
                    at[0],
                    w_stride,
                    at[1],
                    x_stride,
                    at[2],
                    y_stride,
                    end - begin,
                    cut > 0,
                    ahead,
                )
                ahead += 4 * lines * (end - begin)
                n += height
            begin = end
        o += some


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def outputs_of(x: Any, w: Any, y: Any, first: int, last: int) -> None:
    """Columns ``first`` to ``last`` of ``y = x @ w.T``; contiguous float32 matrices."""
    inputs, stride = w.shape[1], y.shape[1]
    at = w.ctypes.data + 4 * inputs * first, y.ctypes.data + 4 * first
    product(at[0], inputs, x.ctypes.data, inputs, at[1], stride, x.shape[0], inputs, last - first)


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def _threaded(x: Any, w: Any, y: Any, threads: int) -> None:
    for t in prange(threads):
        outputs_of(x, w, y, len(w) * t // threads, len(w) * (t + 1) // threads)


def use_threads(threads: int) -> None:
    """Let parallel kernels run in as many threads as torch does, and torch in as many as before.

    Numba, when it first starts its threads, has OpenMP use all cores: and that is often torch's OpenMP too.
    """
    before = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def linear(x: np.ndarray, weight: np.ndarray, y: np.ndarray, threads: int) -> None:
    """``y = x @ weight.T``: x [rows, inputs], weight [outputs, inputs], y [rows, outputs], float32 and contiguous."""
    if threads == 1:
        outputs_of(x, weight, y, 0, len(weight))
        return
    use_threads(threads)
    _threaded(x, weight, y, threads)
