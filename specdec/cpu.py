"""Quicker float32 linear layers for short passes on the CPU, put into a model and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specdec.kernels.linear import linear


class ShortPass:
    """A linear layer's ``forward`` that reads each weight once when there are few rows; torch's own for many.

    The layer keeps its weights; nothing is copied. The same result up to float32 rounding.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``x`` [..., inputs]."""
        return linear(x, self.layer.weight, self.layer.bias)


def install(model: nn.Module) -> int:
    """Give the model's float32 CPU linear layers a ``ShortPass``; returns how many were changed.

    Layers of another type (quantised, adapted) or with a ``forward`` of somebody else's are left alone.
    """
    layers = [layer for layer in _linear_layers(model) if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = ShortPass(layer)  # type: ignore[method-assign, assignment]
    return len(layers)


def remove(model: nn.Module) -> None:
    """Give every layer changed by ``install`` its own ``forward`` back."""
    for layer in model.modules():
        if isinstance(vars(layer).get("forward"), ShortPass):
            del layer.forward


def _linear_layers(model: Any) -> list[nn.Linear]:
    plain = [layer for layer in model.modules() if type(layer) is nn.Linear]
    return [layer for layer in plain if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"]
