"""Rows moved on a GPU: one launch for the keys and values of a layer, whatever the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 16  # slots that one program reads before it writes any


@triton.jit  # type: ignore[untyped-decorator]
def move_rows_kernel(  # type: ignore[no-untyped-def]
    keys, values, paths, base, heads, length, key_row, key_head, key_slot, value_row, value_head, value_slot,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One head of one row, its slots in ascending chunks.

    A chunk reads no slot that an earlier chunk wrote, as a node never lies before its place. Within a chunk it may
    read what it writes itself: so all is read, by all threads, before anything is written.
    """
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    first = tl.load(base + row)
    for start in range(0, length, CHUNK):
        place = start + tl.arange(0, CHUNK)
        node = tl.load(paths + row * length + place, mask=place < length, other=-1)
        moves = (node > place)[:, None]  # neither padding nor where it belongs already
        source, target = (first + node)[:, None], (first + place)[:, None]
        key_of = keys + row * key_row + head * key_head + d[None, :]
        value_of = values + row * value_row + head * value_head + e[None, :]
        key = tl.load(key_of + source * key_slot, mask=moves & (d < D)[None, :])
        value = tl.load(value_of + source * value_slot, mask=moves & (e < E)[None, :])
        tl.debug_barrier()
        tl.store(key_of + target * key_slot, key, mask=moves & (d < D)[None, :])
        tl.store(value_of + target * value_slot, value, mask=moves & (e < E)[None, :])


def move_rows(keys: torch.Tensor, values: torch.Tensor, paths: torch.Tensor, base: torch.Tensor) -> None:
    """As ``specdec.kernels.move_rows``; the entries of a slot must lie side by side."""
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("impl='triton' needs keys and values with contiguous slots; use 'reference'")
    rows, heads, _, d = keys.shape
    e = values.shape[3]
    grid = (rows * heads,)
    blocks = triton.next_power_of_2(d), triton.next_power_of_2(e), _CHUNK
    strides = *keys.stride()[:3], *values.stride()[:3]
    move_rows_kernel[grid](keys, values, paths.contiguous(), base, heads, paths.shape[1], *strides, d, e, *blocks)
