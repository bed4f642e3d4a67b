"""What the target has left after a rejection: norm(max(p - q, 0)), of the target's p and the drafter's q."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, resolve

Impl = Literal["auto", "reference", "triton"]


def sample_residual(
    p: Float[Tensor, "rows vocab"],
    q: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"],
    *,
    impl: Impl = "auto",
) -> Int[Tensor, " rows"]:
    """Draw each row's token from norm(max(p - q, 0)): what follows a rejected draft; q = 0 draws from p itself.

    Where the difference is 0 everywhere, which only rounding can bring about, the draw is from p. A token of weight
    0 is never drawn.

    Leviathan et al. 2023, arXiv 2211.17192.

    Args:
        p, q: probabilities; rows need not sum to exactly 1, but p's must not be 0.
        uniform: one number per row, 0 <= u < 1: the draw is the first token at which the summed weights exceed that
            share of them all.

    Raises:
        ValueError: the shapes differ, or an explicit ``impl`` cannot run on these tensors.
    """
    _check(p, q, uniform)
    if resolve(impl, p) == "triton":
        from specdec.kernels import residual_triton

        with launching(p):
            return residual_triton.sample_residual(p, q, uniform)
    left = (p - q).clamp(min=0)
    weights = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
    summed = weights.double().cumsum(-1)
    goal = uniform.double()[:, None] * summed[:, -1:]
    return torch.searchsorted(summed, goal, right=True)[:, 0]


def swor_step(
    p: Float[Tensor, "rows vocab"],
    q: Float[Tensor, "rows vocab"],
    tokens: Int[Tensor, " rows"],
    uniform: Float[Tensor, " rows"],
    *,
    impl: Impl = "auto",
) -> Bool[Tensor, " rows"]:
    """Judge one sibling of each row, drawn from q without replacement; returns which are accepted.

    Accepted with probability min(1, p(x) / q(x)). Where rejected, ``p`` and ``q`` are changed in place to what the
    next sibling is judged by: p becomes norm(max(p - q, 0)), or stays where that is 0 everywhere; q loses x and is
    normalised anew, to all 0 if x was all it had. After the last sibling the target's token is drawn from p.

    Recursive rejection sampling, Jeon et al. 2024, arXiv 2402.14160.

    Args:
        p, q: probabilities, floating; changed in place.
        tokens: int64, each row's next sibling in the order of the draw.
        uniform: one number per row, 0 <= u < 1.

    Raises:
        ValueError: the shapes differ, or an explicit ``impl`` cannot run on these tensors.
    """
    _check(p, q, uniform)
    if resolve(impl, p) == "triton":
        from specdec.kernels import residual_triton

        with launching(p):
            return residual_triton.swor_step(p, q, tokens, uniform)
    x = tokens[:, None]
    # Strictly less: a uniform of 0 must not accept what the target gives no probability.
    accepted = uniform[:, None] * q.gather(1, x) < p.gather(1, x)
    left, others = (p - q).clamp(min=0), q.scatter(1, x, 0)
    total, rest = left.sum(-1, keepdim=True), others.sum(-1, keepdim=True)
    p.copy_(torch.where(accepted | (total == 0), p, left / total))
    q.copy_(torch.where(accepted, q, others / torch.where(rest > 0, rest, 1)))
    return accepted[:, 0]


def _check(p: Tensor, q: Tensor, uniform: Tensor) -> None:
    if p.ndim != 2 or p.shape != q.shape or uniform.shape != p.shape[:1]:
        shapes = f"{tuple(p.shape)}, {tuple(q.shape)} and {tuple(uniform.shape)}"
        raise ValueError(f"p and q must be [rows, vocab] alike and uniform [rows], got {shapes}")
