"""The most likely tokens of each row of logits: what drafters learn from a verdict."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MANY = 32  # the numba kernel keeps a sorted few: its time grows with k


def topk(
    logits: Float[Tensor, "rows vocab"], k: int, *, impl: Literal["auto", "reference", "torch", "numba"] = "auto"
) -> Int[Tensor, "rows k"]:
    """The ``k`` most likely tokens of each row, best first.

    Ties go to the lower token and NaN counts as the greatest, so that the first column is ``torch.argmax``. Only
    "torch" leaves the order of ties to the device.

    Args:
        logits: of any floating type; rows may lie apart in memory.
        k: from 0 to the vocabulary's size.
        impl: "reference" sorts; "torch" is ``torch.topk``; "numba" is one pass on the CPU over float32, to which
            halves are converted; "auto" takes "numba" where it can and ``k`` is at most 32, else "torch".

    Raises:
        ValueError: logits are not rows of a vocabulary, ``k`` is out of range, or ``impl`` cannot run on them.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"topk needs floating [rows, vocab] logits, got {logits.dtype} {tuple(logits.shape)}")
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}, the vocabulary has {logits.shape[1]} tokens")
    if impl == "auto":
        impl = "numba" if _streams(logits) and k <= _MANY else "torch"
    match impl:
        case "reference":
            return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        case "torch":
            return logits.topk(k).indices
        case "numba" if _streams(logits):
            return _numba(logits, k)
        case "numba":
            raise ValueError(
                f"impl='numba' runs on float32 or halves on the CPU, not {logits.dtype} on {logits.device}"
            )
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'torch' or 'numba'")


def _streams(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _numba(logits: Tensor, k: int) -> Tensor:
    from specdec.kernels.topk_numba import topk as kernel

    (rows, vocab), logits = logits.shape, logits.detach().float()
    if k == 0 or rows == 0:
        return torch.empty(rows, k, dtype=torch.int64)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    stride = logits.stride(0)
    flat = logits.as_strided(((rows - 1) * stride + vocab,), (1,))
    return torch.from_numpy(kernel(flat.numpy(), rows, stride, vocab, k))
