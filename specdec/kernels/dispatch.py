"""Which implementation of a kernel runs, and where."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def resolve(impl: str, tensor: Tensor, cpu: str = "reference") -> str:
    """The implementation that ``impl`` asks for: "auto" is Triton on a GPU and ``cpu`` elsewhere.

    Args:
        impl: "auto", "reference", "triton" or ``cpu``.
        tensor: what it is to run on.
        cpu: the quickest implementation there is for the CPU.

    Raises:
        ValueError: there is no such implementation, or it cannot run on ``tensor``'s device.
    """
    device = tensor.device.type
    if impl == "auto":
        return cpu if device == "cpu" else "triton" if runs_triton(tensor) else "reference"
    able = {"reference": True, "triton": runs_triton(tensor), cpu: cpu == "reference" or device == "cpu"}
    if impl not in able:
        raise ValueError(f"impl is {impl!r}; use 'auto', {', '.join(map(repr, able))}")
    if not able[impl]:
        raise ValueError(f"impl={impl!r} cannot run on {device} tensors here; use 'auto' or 'reference'")
    return impl


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels take this tensor: on a GPU, or on the CPU under Triton's interpreter."""
    if tensor.device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _installed()
    return tensor.device.type == "cuda" and _installed()


def launching(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's: makes it so for a while."""
    beside: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return beside


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
