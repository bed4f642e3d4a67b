"""Our CPU kernels as something to put into a model for one run and take out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from specdec import cpu


class Kernels:
    """What ``cpu.install`` makes of a model's layers, made at the first use and kept: making it takes seconds.

    Args:
        model: whose layers; views of it share them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._forwards: dict[Any, Callable[..., Any]] | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The kernels in the model for a while."""
        forwards = self._forwards if self._forwards is not None else self._make()
        for layer, forward in forwards.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in forwards:
                del layer.forward

    def _make(self) -> dict[Any, Callable[..., Any]]:
        others = {layer for layer in self.model.modules() if "forward" in vars(layer)}
        cpu.install(self.model)
        ours = {layer: layer.forward for layer in self.model.modules() if "forward" in vars(layer)}
        cpu.remove(self.model)
        self._forwards = {layer: forward for layer, forward in ours.items() if layer not in others}
        return self._forwards
