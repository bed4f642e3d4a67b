"""Top-k for the CPU: every logit is read once, by whole vectors, and few are looked at twice.

The k best entries of a row lie in the k blocks with the best maxima, so those blocks alone are searched. Maxima are
taken over the floats' bits as integers, in which order compilers vectorise and NaN can be told.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_BLOCK = 128
_MAGNITUDE, _INFINITY, _NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000  # float32 bits without the sign


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def topk(logits: np.ndarray, k: int) -> np.ndarray:
    """Best entries of each row of ``logits`` [rows, vocab], float32 and contiguous; 1 <= k <= vocab."""
    rows, vocab = logits.shape
    out = np.empty((rows, k), np.int64)
    best = np.empty(k, np.float32)
    maxima = np.empty(-(-vocab // _BLOCK), np.float32)
    blocks = np.empty(min(k, len(maxima)), np.int64)
    for row in range(rows):
        values = logits[row]
        _block_maxima(values.view(np.int32), maxima.view(np.int32))
        _search(maxima, 0, len(maxima), blocks, best, 0)
        found = 0
        for block in blocks:
            found = _search(values, block * _BLOCK, min(block * _BLOCK + _BLOCK, vocab), out[row], best, found)
    return out


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _block_maxima(bits: np.ndarray, out: np.ndarray) -> None:
    for block in range(len(bits) // _BLOCK):
        out[block] = _maximum(bits[block * _BLOCK : block * _BLOCK + _BLOCK], _BLOCK)
    rest = len(bits) % _BLOCK
    if rest:
        out[-1] = _maximum(bits[-rest:], rest)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _maximum(bits: np.ndarray, n: int) -> np.int32:
    """Bits of the greatest of ``n`` floats, NaN the greatest of all."""
    greatest, magnitude = np.int32(-_MAGNITUDE - 1), np.int32(0)
    for i in range(n):
        x = bits[i]
        # A negative float's bits grow with its magnitude: flipped, all bits order as the floats do.
        greatest = max(greatest, np.int32(x ^ ((x >> 31) & _MAGNITUDE)))
        magnitude = max(magnitude, np.int32(x & _MAGNITUDE))
    return np.int32(_NAN) if magnitude > _INFINITY else np.int32(greatest ^ ((greatest >> 31) & _MAGNITUDE))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _search(values: np.ndarray, start: int, stop: int, ids: np.ndarray, best: np.ndarray, found: int) -> int:
    """Put the best of ``values[start:stop]`` in their places among the ``found`` best so far; returns how many now."""
    k = len(ids)
    for i in range(start, stop):
        x = values[i]
        if found == k and (x < best[k - 1] or not _before(x, i, best[k - 1], ids[k - 1])):
            continue
        found = min(found + 1, k)
        place = found - 1
        while place > 0 and _before(x, i, best[place - 1], ids[place - 1]):
            best[place], ids[place] = best[place - 1], ids[place - 1]
            place -= 1
        best[place], ids[place] = x, i
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _before(x: float, i: int, y: float, j: int) -> bool:
    """Whether entry i, of value x, ranks before entry j, of value y: NaN is greatest, ties go to the lower index."""
    if np.isnan(x) or np.isnan(y):
        return np.isnan(x) and (i < j or not np.isnan(y))
    return x > y or (x == y and i < j)
