"""A matrix product for few rows on the CPU: every weight is read from memory once, whatever the number of rows.

For one row a product is nothing but reading the weights; general libraries turn to a blocked algorithm at two rows,
which costs as much for two as for sixteen. Here each thread walks down its own outputs' weights in order. While a row
or a few, which stay in the nearest cache, are multiplied by one output's weights, the next are fetched. For more rows a
few outputs' weights are what stays there while all rows pass by in tiles. So the time is the longer of reading and
multiplying, not their sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads

from specdec.kernels.tile_numba import LANES, LINE, LINES, OUTPUTS, ROWS, SINGLE, tile

if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"  # numba's own would abort the process where two threads call at once

NEAR, FAR = 2048, 7168  # bytes by which weights are fetched ahead for two rows or fewer, and for more
SHORTEST = 256  # inputs for which single outputs pay: of fewer, putting lanes together takes as long as multiplying
NEAREST = 6144  # numbers of x that stay in the nearest cache while weights pass by
LONGEST = 1024  # inputs at a time: of more, a few outputs' weights do not stay in the nearest cache for all tiles


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def product(
    w: int, w_stride: int, x: int, x_stride: int, y: int, y_stride: int, rows: int, inputs: int, outputs: int
) -> None:
    """``y = x @ w.T`` in this thread, of matrices given by address and stride in float32 numbers."""
    single = rows == 1 or (rows <= SINGLE and inputs >= SHORTEST and rows * inputs <= NEAREST)
    if single or rows <= ROWS:
        some = 1 if single else OUTPUTS
        far = 4 * OUTPUTS * w_stride if not single else NEAR if rows <= 2 else FAR
        groups = outputs // some
        tile(some, rows, some, w, w_stride, x, x_stride, y, y_stride, inputs, 0, w + far, groups)
        w, y, rest = w + 4 * w_stride * some * groups, y + 4 * some * groups, outputs - some * groups
        tile(1, rows, 1, w, w_stride, x, x_stride, y, y_stride, inputs, 0, w + far, rest)
    else:
        _tiled(w, w_stride, x, x_stride, y, y_stride, rows, inputs, outputs)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _tiled(
    w: int, w_stride: int, x: int, x_stride: int, y: int, y_stride: int, rows: int, inputs: int, outputs: int
) -> None:
    """``product`` for more rows, in tiles."""
    tiles = (rows + ROWS - 1) // ROWS
    lines = 4 if tiles == 2 else LINES  # more turns, fewer lines in each, so that fetching never stops
    cuts = (inputs + LONGEST - 1) // LONGEST
    o = 0
    while o < outputs:
        some = OUTPUTS if o + OUTPUTS <= outputs else 1
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
                    1,
                )
                ahead += 4 * lines * (end - begin)
                n += height
            begin = end
        o += some


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def room(rows: int, columns: int) -> Any:
    """An empty float32 matrix that begins where a line of memory does, as torch's: what lies in two takes two loads."""
    numbers = np.empty(rows * columns + LINE // 4, np.float32)
    first = -(numbers.ctypes.data // 4) % (LINE // 4)
    return numbers[first : first + rows * columns].reshape(rows, columns)


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


def check_threading() -> None:
    """See that several threads may call parallel kernels at once.

    Raises:
        ValueError: numba was told to use a library with which that aborts the process.
    """
    if config.THREADING_LAYER == "workqueue":
        raise ValueError(
            "numba's threading layer is 'workqueue', which aborts a process whose threads call at once; "
            "unset NUMBA_THREADING_LAYER, or set it to omp or tbb"
        )


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
