"""Which adapter a model answers with, where it has any."""

from __future__ import annotations

from torch import nn

INSIDE = "\0"  # between a namespace and the adapter in it: no namespace of a caller's holds it


def active(model: nn.Module) -> str:
    """The names of the adapters that take part in the model's next pass; "" for the model as it is without.

    PEFT's layers are asked themselves, so it does not matter by whose hand, or under which wrapper, they were switched.
    """
    layers = [
        layer for layer in model.modules() if isinstance(getattr(type(layer), "disable_adapters", None), property)
    ]
    return ",".join(sorted({"+".join(_taking_part(layer)) for layer in layers}))


def _taking_part(layer: nn.Module) -> list[str]:
    if layer.disable_adapters:
        return []
    return list(layer.merged_adapters or layer.active_adapters)  # type: ignore[arg-type]


def within(namespace: str, adapter: str) -> str:
    """The part of a namespace that is for what one adapter wrote; the namespace itself for the bare model."""
    return f"{namespace}{INSIDE}{adapter}" if adapter else namespace
