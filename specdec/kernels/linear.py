"""A linear layer's product, quick for few rows."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

Impl = Literal["auto", "reference", "numba"]
FEW = 16  # rows up to which reading the weights takes longer than multiplying them


def linear(
    x: Float[torch.Tensor, "*rows inputs"],
    weight: Float[torch.Tensor, "outputs inputs"],
    bias: Float[torch.Tensor, " outputs"] | None = None,
    *,
    impl: Impl = "auto",
    most: int = FEW,
) -> Float[torch.Tensor, "*rows outputs"]:
    """``x @ weight.T + bias``, equal to torch's up to rounding.

    Args:
        impl: "reference" is torch; "numba" reads each weight once, for float32 on the CPU; "auto" takes it for
            few rows.
        most: how many rows are few.

    Raises:
        ValueError: where an explicit ``impl`` cannot run.
    """
    if impl == "numba" and not runs(x, weight):
        raise ValueError(f"numba takes contiguous float32 weights on the CPU; got {weight.dtype} on {weight.device}")
    few = x.numel() <= most * x.shape[-1]
    if impl == "numba" or (impl == "auto" and few and runs(x, weight)):
        return _numba(x, weight, bias)
    return functional.linear(x, weight, bias)


def runs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the numba kernel can compute this, with nothing left for autograd."""
    plain = weight.dtype == x.dtype == torch.float32 and weight.device.type == x.device.type == "cpu"
    plain = plain and type(weight) in (torch.Tensor, nn.Parameter)  # a quantised tensor only says it is float32
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    others = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return plain and weight.is_contiguous() and not recorded and not others


def _numba(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from specdec.kernels import linear_numba

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(rows), len(weight), dtype=torch.float32)
    linear_numba.linear(rows.detach().numpy(), weight.detach().numpy(), y.numpy(), torch.get_num_threads())
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))
