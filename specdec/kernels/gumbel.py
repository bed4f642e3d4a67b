"""Gumbel noise that turns sampling into top-k: the greatest perturbed logit is a draw, the k greatest are k draws."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, resolve
from specdec.kernels.topk import topk

_MANY = 16  # the Triton kernel takes as many maxima over each slice


def gumbel_topk(
    logits: Float[Tensor, "rows vocab"],
    noise: Float[Tensor, "rows vocab"],
    k: int = 1,
    *,
    impl: Literal["auto", "reference", "numba", "triton"] = "auto",
) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Draw ``k`` tokens of each row without replacement from softmax(logits), and their perturbed logits.

    Tokens come in the order of the draw, the first being a plain sample; their perturbed logits, float32, descend.
    Tokens of probability 0 come last, with -inf, where there are not enough others.

    Gumbel-max sampling; for several draws Kool, van Hoof and Welling 2019, arXiv 1903.06059.

    Args:
        logits: log-probabilities up to a constant per row, -inf for 0.
        noise: standard exponential draws, as ``Tensor.exponential_`` makes them: Gumbel noise is -log of them. Of
            uniform draws u they are -log(u); but a float32 u is coarse near 1, where the greatest noise comes from.
        k: from 1 to the vocabulary's size; "triton" takes up to 16.
        impl: "numba" is for the CPU; it looks for the greatest after torch has perturbed the logits.

    Raises:
        ValueError: the shapes differ, ``k`` is out of range, or an explicit ``impl`` cannot run on these tensors.
    """
    if logits.ndim != 2 or logits.shape != noise.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(noise.shape)}"
        raise ValueError(f"logits and noise must be [rows, vocab] alike, got {shapes}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}, the vocabulary has {logits.shape[1]} tokens")
    chosen = resolve(impl, logits, cpu="numba")
    if chosen == "triton" and k <= _MANY:
        from specdec.kernels import gumbel_triton

        with launching(logits):
            return gumbel_triton.gumbel_topk(logits, noise, k)
    if impl == "triton":
        raise ValueError(f"impl='triton' takes k up to {_MANY}, got {k}; use 'auto'")
    # No noise may be 0, or a token would be drawn whatever its probability.
    perturbed = logits.float() - noise.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    tokens = topk(perturbed, k, impl="numba" if chosen == "numba" else "reference")
    return tokens, perturbed.gather(1, tokens)
