"""Ancestor bits on a GPU: every node climbs to the root by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 64


@triton.jit  # type: ignore[untyped-decorator]
def ancestors_kernel(  # type: ignore[no-untyped-def]
    parents, out, nodes, words, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's nodes; takes as many steps as its deepest node has ancestors."""
    row = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS)
    inside = node < nodes
    bits = tl.zeros([BLOCK, WORDS], tl.int64)
    climber = tl.where(inside, node, -1).to(tl.int64)
    while tl.max(climber, 0) >= 0:
        bit = tl.full([BLOCK], 1, tl.int64) << (climber & 63)
        here = (climber >= 0)[:, None] & (word[None, :] == (climber >> 6)[:, None])
        bits |= tl.where(here, bit[:, None], 0)
        climber = tl.load(parents + row * nodes + climber, mask=climber >= 0, other=-1)
    place = (row * nodes + node[:, None]) * words + word[None, :]
    tl.store(out + place, bits, mask=inside[:, None] & (word < words)[None, :])


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """As ``specdec.kernels.ancestors``."""
    rows, nodes = parents.shape
    words = triton.cdiv(nodes, 64)
    out = torch.empty(rows, nodes, words, dtype=torch.int64, device=parents.device)
    grid = (rows, triton.cdiv(nodes, _BLOCK))
    ancestors_kernel[grid](parents.contiguous(), out, nodes, words, triton.next_power_of_2(words), _BLOCK)
    return out
