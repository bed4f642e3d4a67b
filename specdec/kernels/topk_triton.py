"""Top-k on a GPU: every logit is read once, and no row is sorted.

Each program takes the k best of one slice of a row; one more per row takes the k best of those. An entry is one
integer that orders as (value, then the lower token) does, so that a maximum is all that selection needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLICE = 4096
_LEAST = tl.constexpr(-(2**63))
_LAST = tl.constexpr(2**31 - 1)  # flips a token to its place among equal values, and back


@triton.jit
def entries(values, tokens, inside):  # type: ignore[no-untyped-def]
    """Integers that order as the values do, NaN the greatest, and equal values by the lower token."""
    values = values.to(tl.float32)
    values = tl.where(values == 0, 0.0, values)  # the two zeros are equal
    bits = values.to(tl.int32, bitcast=True)
    # A negative float's bits grow with its magnitude: flipped, all bits order as the floats do.
    rank = tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return tl.where(inside, (rank.to(tl.int64) << 32) | (tokens ^ _LAST), _LEAST)


@triton.jit  # type: ignore[untyped-decorator]
def store_best(entry, out, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the K greatest entries in descending order; no two are equal."""
    for i in range(K):
        best = tl.max(entry, 0)
        tl.store(out + i, best)
        entry = tl.where(entry == best, _LEAST, entry)


@triton.jit  # type: ignore[untyped-decorator]
def slices_kernel(logits, out, stride, vocab, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The K best entries of one slice of one row, [rows, slices, K]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    value = tl.load(logits + row * stride + token, mask=inside, other=0)
    store_best(entries(value, token, inside), out + (row * tl.num_programs(1) + part) * K, K)


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(entry, tokens, values, count, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The K best of one row's ``count`` entries, as tokens and float32 values."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    left = tl.load(entry + row * count + i, mask=i < count, other=_LEAST)
    for place in range(K):
        best = tl.max(left, 0)
        left = tl.where(left == best, _LEAST, left)
        rank = (best >> 32).to(tl.int32)
        value = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(tokens + row * K + place, (best & _LAST) ^ _LAST)
        tl.store(values + row * K + place, value)


def merge(entry: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of each row and their values, from its slices' entries [rows, slices, k]."""
    rows, count = entry.shape[0], entry.shape[1] * k
    tokens = torch.empty(rows, k, dtype=torch.int64, device=entry.device)
    values = torch.empty(rows, k, dtype=torch.float32, device=entry.device)
    merge_kernel[(rows,)](entry, tokens, values, count, k, triton.next_power_of_2(count))
    return tokens, values


def topk(logits: torch.Tensor, k: int) -> torch.Tensor:
    """As ``specdec.kernels.topk``, for k from 1 to 16 and rows of logits that lie side by side."""
    rows, vocab = logits.shape
    entry = torch.empty(rows, triton.cdiv(vocab, SLICE), k, dtype=torch.int64, device=logits.device)
    slices_kernel[entry.shape[:2]](logits, entry, logits.stride(0), vocab, k, SLICE, num_warps=8)
    return merge(entry, k)[0]
