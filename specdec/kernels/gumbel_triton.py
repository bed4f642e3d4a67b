"""Gumbel-top-k on a GPU: logits and noise are each read once, and perturbed logits are not written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specdec.kernels.topk_triton import SLICE, entries, merge, store_best

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit  # type: ignore[untyped-decorator]
def perturbed_slices_kernel(  # type: ignore[no-untyped-def]
    logits, noise, out, stride, noise_stride, vocab, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best perturbed entries of one slice of one row, [rows, slices, K]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    logit = tl.load(logits + row * stride + token, mask=inside, other=0).to(tl.float32)
    draw = tl.load(noise + row * noise_stride + token, mask=inside, other=1).to(tl.float32)
    perturbed = logit - tl.log(tl.maximum(draw, _TINY))
    store_best(entries(perturbed, token, inside), out + (row * tl.num_programs(1) + part) * K, K)


def gumbel_topk(logits: torch.Tensor, noise: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``specdec.kernels.gumbel_topk``, for k up to 16."""
    logits, noise = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (logits, noise))
    rows, vocab = logits.shape
    entry = torch.empty(rows, triton.cdiv(vocab, SLICE), k, dtype=torch.int64, device=logits.device)
    strides = logits.stride(0), noise.stride(0)
    perturbed_slices_kernel[entry.shape[:2]](logits, noise, entry, *strides, vocab, k, SLICE, num_warps=8)
    return merge(entry, k)
