"""The accept walk on a GPU: one program per row holds its tree and goes down node by node."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def walk_kernel(tokens, parents, choices, path, bonus, nodes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row; takes as many steps as it accepts nodes."""
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK)
    inside = node < nodes
    token = tl.load(tokens + row * nodes + node, mask=inside, other=0)
    parent = tl.load(parents + row * nodes + node, mask=inside, other=-1)
    accepted = tl.full([BLOCK], -1, tl.int64)
    depth, last = 0, 0
    choice = tl.load(choices + row * nodes)
    while last < nodes:
        accepted = tl.where(node == depth, last, accepted)
        choice = tl.load(choices + row * nodes + last)
        last = tl.min(tl.where((parent == last) & (token == choice), node, nodes), 0)
        depth += 1
    tl.store(path + row * nodes + node, accepted, mask=inside)
    tl.store(bonus + row, choice)


def walk(tokens: torch.Tensor, parents: torch.Tensor, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``specdec.kernels.walk``."""
    rows, nodes = tokens.shape
    path, bonus = torch.empty_like(tokens, memory_format=torch.contiguous_format), tokens.new_empty(rows)
    arrays = tokens.contiguous(), parents.contiguous(), choices.contiguous()
    walk_kernel[(rows,)](*arrays, path, bonus, nodes, triton.next_power_of_2(nodes))
    return path, bonus
