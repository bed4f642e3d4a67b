"""The most likely tokens of each row of logits: what drafters learn from a verdict."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, runs_triton

_MANY = {"numba": 32, "triton": 16}  # both take the best one by one: their time grows with k


def topk(
    logits: Float[Tensor, "rows vocab"],
    k: int,
    *,
    impl: Literal["auto", "reference", "torch", "numba", "triton"] = "auto",
) -> Int[Tensor, "rows k"]:
    """The ``k`` most likely tokens of each row, best first.

    Ties go to the lower token and NaN counts as the greatest, so that the first column is ``torch.argmax``. Only
    "torch" leaves the order of ties to the device.

    Args:
        logits: of any floating type; rows may lie apart in memory.
        k: from 0 to the vocabulary's size.
        impl: "reference" sorts; "torch" is ``torch.topk``; "numba" is one pass on the CPU over float32, to which
            halves are converted; "triton" is one pass on a GPU, for ``k`` up to 16; "auto" takes "numba" where it
            can and ``k`` is at most 32, "triton" on a GPU where it can, else "torch".

    Raises:
        ValueError: logits are not rows of a vocabulary, ``k`` is out of range, or ``impl`` cannot run on them.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"topk needs floating [rows, vocab] logits, got {logits.dtype} {tuple(logits.shape)}")
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}, the vocabulary has {logits.shape[1]} tokens")
    if impl == "auto":
        fast: Literal["numba", "triton"] = "numba" if logits.device.type == "cpu" else "triton"
        impl = fast if _runs(fast, logits) and k <= _MANY[fast] else "torch"
    match impl:
        case "reference":
            return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        case "torch":
            return logits.topk(k).indices
        case "numba" if _runs("numba", logits):
            return _numba(logits, k)
        case "triton" if _runs("triton", logits) and k <= _MANY["triton"]:
            return _triton(logits, k)
        case "numba":
            raise ValueError(
                f"impl='numba' runs on float32 or halves on the CPU, not {logits.dtype} on {logits.device}"
            )
        case "triton":
            raise ValueError(
                f"impl='triton' runs on float32 or halves on a GPU for k up to {_MANY['triton']}, "
                f"not {logits.dtype} on {logits.device} for k = {k}"
            )
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'torch', 'numba' or 'triton'")


def _runs(impl: Literal["numba", "triton"], logits: Tensor) -> bool:
    here = logits.device.type == "cpu" if impl == "numba" else runs_triton(logits)
    return here and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _numba(logits: Tensor, k: int) -> Tensor:
    from specdec.kernels.topk_numba import topk as kernel

    if k == 0 or len(logits) == 0:
        return torch.empty(len(logits), k, dtype=torch.int64)
    plain = logits.dtype == torch.float32 and not logits.requires_grad
    values = logits.numpy() if plain else logits.detach().float().numpy()  # each call counts in a short pass
    return torch.from_numpy(kernel(np.ascontiguousarray(values), k))


def _triton(logits: Tensor, k: int) -> Tensor:
    from specdec.kernels import topk_triton

    if k == 0 or len(logits) == 0:
        return torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    with launching(logits):
        return topk_triton.topk(logits if logits.stride(1) == 1 else logits.contiguous(), k)
