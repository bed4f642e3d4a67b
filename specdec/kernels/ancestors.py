"""Who is whose ancestor, as bits: what a tree's attention kernel reads in place of a mask."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from specdec.kernels.dispatch import launching, resolve


def ancestors(
    parents: Int[Tensor, "rows nodes"], *, impl: Literal["auto", "reference", "numba", "triton"] = "auto"
) -> Int[Tensor, "rows nodes words"]:
    """What each node may attend to: bit ``j % 64`` of word ``j // 64`` of node i is set iff j is i or its ancestor.

    Args:
        parents: int64, of each node, parents first; -1 for the root, and for the nodes that fill up a smaller tree,
            which see only themselves.

    Raises:
        ValueError: an explicit ``impl`` cannot run on these tensors.
    """
    chosen = resolve(impl, parents, cpu="numba")
    if chosen == "triton":
        from specdec.kernels import ancestors_triton

        with launching(parents):
            return ancestors_triton.ancestors(parents)
    if chosen == "numba":
        from specdec.kernels import ancestors_numba

        return torch.from_numpy(ancestors_numba.ancestors(parents.numpy()))
    return _reference(parents)


def _reference(parents: Tensor) -> Tensor:
    rows, nodes = parents.shape
    words = torch.zeros(rows, nodes, -(-nodes // 64), dtype=torch.int64, device=parents.device)
    row = torch.arange(rows, device=parents.device)
    for node in range(nodes):
        parent = parents[:, node]
        words[:, node] = torch.where(parent[:, None] < 0, 0, words[row, parent.clamp(min=0)])
        words[:, node, node // 64] |= torch.tensor(1, device=parents.device) << node % 64
    return words
