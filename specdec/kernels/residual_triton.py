"""Residual sampling on a GPU: one launch sums slices of each row, another draws or normalises."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SLICE = 4096


@triton.jit  # type: ignore[untyped-decorator]
def sums_kernel(  # type: ignore[no-untyped-def]
    p, q, tokens, uniform, sums, accepted, vocab, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one slice of one row: the sums of max(p - q, 0) and of what else is asked for, [2, rows, slices].

    The other sum is that of p, for a draw; in a step it is that of q without the sibling, who is judged here, while
    p and q are still whole.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    p_x = tl.load(p + row * vocab + token, mask=inside, other=0).to(tl.float32)
    q_x = tl.load(q + row * vocab + token, mask=inside, other=0).to(tl.float32)
    other = p_x
    if STEP:
        x = tl.load(tokens + row)
        other = tl.where(token == x, 0.0, q_x)
        p_of, q_of = tl.load(p + row * vocab + x).to(tl.float32), tl.load(q + row * vocab + x).to(tl.float32)
        # Strictly less: a uniform of 0 must not accept what the target gives no probability.
        tl.store(accepted + row, tl.load(uniform + row) * q_of < p_of)  # the same from every slice
    place = row * tl.num_programs(1) + part
    tl.store(sums + place, tl.sum(tl.maximum(p_x - q_x, 0.0), 0))
    tl.store(sums + tl.num_programs(0) * tl.num_programs(1) + place, tl.sum(other, 0))


@triton.jit
def first_beyond(weights, share, places):  # type: ignore[no-untyped-def]
    """The first place where the summed weights exceed ``share``; the last of any weight if rounding lets none."""
    beyond = (tl.cumsum(weights, 0) > share) & (weights > 0)
    first = tl.min(tl.where(beyond, places, 2**30), 0)
    return tl.where(first < 2**30, first, tl.max(tl.where(weights > 0, places, 0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    p, q, uniform, sums, out, rows, vocab, slices, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: find the slice by its sum, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    left = tl.load(sums + row * slices + part, mask=part < slices, other=0)
    whole = tl.load(sums + (rows + row) * slices + part, mask=part < slices, other=0)
    some = tl.sum(left, 0) > 0
    weight = tl.where(some, left, whole)
    share = tl.load(uniform + row) * tl.sum(weight, 0)
    chosen = first_beyond(weight, share, part)
    share -= tl.sum(tl.where(part < chosen, weight, 0.0), 0)
    token = chosen * BLOCK + tl.arange(0, BLOCK)
    p_x = tl.load(p + row * vocab + token, mask=token < vocab, other=0).to(tl.float32)
    q_x = tl.load(q + row * vocab + token, mask=token < vocab, other=0).to(tl.float32)
    tl.store(out + row, first_beyond(tl.where(some, tl.maximum(p_x - q_x, 0.0), p_x), share, token).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def step_kernel(  # type: ignore[no-untyped-def]
    p, q, tokens, sums, accepted, rows, vocab, slices, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slice of one row: if the sibling was rejected, what the next one is judged by."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(accepted + row):
        return
    part = tl.arange(0, SLICES)
    left = tl.sum(tl.load(sums + row * slices + part, mask=part < slices, other=0), 0)
    others = tl.sum(tl.load(sums + (rows + row) * slices + part, mask=part < slices, other=0), 0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    p_x = tl.load(p + row * vocab + token, mask=inside, other=0).to(tl.float32)
    q_x = tl.load(q + row * vocab + token, mask=inside, other=0).to(tl.float32)
    q_rest = tl.where(token == tl.load(tokens + row), 0.0, q_x) / tl.where(others > 0, others, 1.0)
    p_rest = tl.where(left > 0, tl.maximum(p_x - q_x, 0.0) / tl.where(left > 0, left, 1.0), p_x)
    tl.store(p + row * vocab + token, p_rest, mask=inside)
    tl.store(q + row * vocab + token, q_rest, mask=inside)


def sample_residual(p: torch.Tensor, q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As ``specdec.kernels.residual.sample_residual``."""
    p, q, uniform = p.contiguous(), q.contiguous(), uniform.contiguous()
    (rows, vocab), slices = p.shape, triton.cdiv(p.shape[1], _SLICE)
    sums = torch.empty(2, rows, slices, dtype=torch.float32, device=p.device)
    out = torch.empty(rows, dtype=torch.int64, device=p.device)
    sums_kernel[(rows, slices)](p, q, None, None, sums, None, vocab, False, _SLICE, num_warps=8)
    draw_kernel[(rows,)](
        p, q, uniform, sums, out, rows, vocab, slices, triton.next_power_of_2(slices), _SLICE, num_warps=8
    )
    return out


def swor_step(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As ``specdec.kernels.residual.swor_step``; rows must lie side by side."""
    if not p.is_contiguous() or not q.is_contiguous():
        raise ValueError("impl='triton' changes contiguous p and q in place; use 'reference'")
    (rows, vocab), slices = p.shape, triton.cdiv(p.shape[1], _SLICE)
    sums = torch.empty(2, rows, slices, dtype=torch.float32, device=p.device)
    accepted = torch.empty(rows, dtype=torch.bool, device=p.device)
    tokens, uniform = tokens.contiguous(), uniform.contiguous()
    sums_kernel[(rows, slices)](p, q, tokens, uniform, sums, accepted, vocab, True, _SLICE, num_warps=8)
    blocks = triton.next_power_of_2(slices), _SLICE
    step_kernel[(rows, slices)](p, q, tokens, sums, accepted, rows, vocab, slices, *blocks, num_warps=8)
    return accepted
