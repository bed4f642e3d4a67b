"""The accept walk of a whole batch at once: from each root down, while the tree has guessed the target's choice."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from specdec.kernels.dispatch import launching, resolve


def walk(
    tokens: Int[Tensor, "rows nodes"],
    parents: Int[Tensor, "rows nodes"],
    choices: Int[Tensor, "rows nodes"],
    *,
    impl: Literal["auto", "reference", "triton"] = "auto",
) -> tuple[Int[Tensor, "rows nodes"], Int[Tensor, " rows"]]:
    """The accepted nodes of each row, root first and -1 after the last, and the token the target adds to them.

    Exact for any tree whose guesses do not look at the choices: every committed token is the target's own.

    Args:
        tokens: int64, of each node.
        parents: int64, of each node, parents first; -1 for the root and for nodes that fill up a smaller tree.
        choices: int64, the token that the target would commit after each node: its argmax, or a draw.

    Raises:
        ValueError: the shapes differ, or an explicit ``impl`` cannot run on these tensors.
    """
    if not tokens.shape == parents.shape == choices.shape:
        shapes = f"{tuple(tokens.shape)}, {tuple(parents.shape)} and {tuple(choices.shape)}"
        raise ValueError(f"tokens, parents and choices must be [rows, nodes] alike, got {shapes}")
    if resolve(impl, tokens) == "triton":
        from specdec.kernels import walk_triton

        with launching(tokens):
            return walk_triton.walk(tokens, parents, choices)
    return _reference(tokens, parents, choices)


def _reference(tokens: Tensor, parents: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    guessed = tokens == choices.gather(1, parents.clamp(min=0))
    path = torch.full_like(tokens, -1)
    path[:, 0] = 0
    last = torch.zeros_like(tokens[:, :1])
    for depth in range(1, tokens.shape[1]):
        children = guessed & (parents == last)
        found = children.any(1, keepdim=True)
        if not found.any():
            break
        last = torch.where(found, children.int().argmax(1, keepdim=True), last)
        path[:, depth : depth + 1] = torch.where(found, last, -1)
    return path, choices.gather(1, last)[:, 0]
