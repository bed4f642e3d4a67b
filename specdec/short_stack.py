"""All decoder layers of a model in one call, where there are few rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import nn
from transformers.utils import output_capturing

from specdec.cache import Open, SlotCache
from specdec.short_layer import RECORDING, ShortLayer, addresses, alone
from specdec.straight_pass import StraightPass

ENDS = ("embed_tokens", "rotary_emb", "norm")  # what a plain decoder has besides its layers
NOTHING, NOWHERE_HIDDEN = np.empty(0, np.float32), np.empty((0, 0, 0), np.bool_)
Tables = tuple[np.ndarray, ...]  # addresses by layer: of weights, biases, and norms
RUNNING: ContextVar[Running | None] = ContextVar("RUNNING", default=None)  # the pass of a ShortStack that is under way


class ShortStack:
    """The ``forward`` of a module with a list of layers, of which the first then runs them all in one call.

    The others hand on what comes in. The module's own ``forward`` is run around them, so that embeddings, masks and
    rotary embeddings are its own. Layers run one by one where the cache is not made of alike ``SlotLayer``s, where
    somebody listens to a layer, and wherever a ``ShortLayer`` leaves a pass to the layer itself.

    Where ``model`` says nothing but what its embedding, layers, norm and head do, one after the other, its logits can
    be had ``straight``.

    Args:
        owner: the module.
        modules: its list of layers.

    Attributes:
        model: the causal LM around the module, if it is such a one.
    """

    model: Any = None
    _known: tuple[Any, ...] = ()

    def __init__(self, owner: nn.Module, modules: nn.ModuleList) -> None:
        self.owner, self.modules = owner, modules
        self.layers: list[ShortLayer] = [vars(layer)["forward"] for layer in modules]
        self.parts = [part for layer in self.layers for part in layer.parts]
        self._read()
        for layer in self.layers:
            layer.stack = self

    def _read(self) -> None:
        """Look at the weights where the layers know them to be."""
        self.held = [each for layer in self.layers for each in layer.held]
        self.addresses = addresses(self.held)
        tables = [[_address(part) for part in parts] for layer in self.layers for parts in layer.tables]
        self.tables: Tables = tuple(np.array(tables[kind::3]) for kind in range(3))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``forward``, its layers told that they are run in order.

        Raises:
            RuntimeError: they were not, or not all given the same mask, rotary embeddings and cache.
        """
        running = Running(self)
        token = RUNNING.set(running)
        try:
            output = type(self.owner).forward(self.owner, *args, **kwargs)
        finally:
            RUNNING.reset(token)
        if running.result is not None and running.passed < len(self.layers):
            raise self._surprised("leaves out its last layers")
        return output

    def straight(self) -> StraightPass | None:
        """How to have what ``model`` says without asking it; None where somebody may listen to a part of it."""
        if self.model is None or self._code() != self._known or not self._intact():
            return None
        embed, rotary, norm = (self.owner.get_submodule(name) for name in ENDS)
        heard = (self.model, self.owner, embed, rotary, norm)
        if any(each._forward_hooks or each._forward_pre_hooks for each in heard):
            return None
        known = getattr(embed, "weight", None)
        if known is None or known.dtype != torch.float32 or known.device.type != "cpu":  # as the layers are
            return None
        return StraightPass(self, embed, rotary, norm, self.model.get_output_embeddings())

    def logits(
        self, tokens: Int[torch.Tensor, "rows nodes"], mask: Any, positions: torch.Tensor, cache: Any
    ) -> Float[torch.Tensor, "rows nodes vocab"] | None:
        """What ``model`` says of a pass; None where it must be asked itself.

        Args:
            mask, positions: as the model takes them.
        """
        if positions.ndim != 2 or (straight := self.straight()) is None:
            return None
        seen = NOWHERE_HIDDEN
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            if tokens.shape[1] > 1 or not bool(mask.all()):
                return None
        elif mask is not None:
            seen = mask[:, 0].expand(*tokens.shape, -1).contiguous().numpy()
        return straight.logits(tokens.numpy(), positions.expand_as(tokens).contiguous().numpy(), seen, cache)

    def lead(self, model: Any) -> bool:
        """Be asked for the ``logits`` of a causal LM, if it may be one for which they are right."""
        ends = [*(self.owner._modules.get(name) for name in ENDS), model.get_output_embeddings()]
        if model.base_model is not self.owner or None in ends:
            return False
        self.model = model
        self._known = self._code()
        return True

    def _code(self) -> tuple[Any, ...]:
        """What would be run where the ``logits`` are not had without."""
        layer, model = type(self.modules[0]), self.model
        return type(model).forward, type(self.owner).forward, layer.__call__, vars(model).get("forward")

    def run(self, layer: ShortLayer, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor | None:
        """What a layer's ``forward`` returns; None where it must run itself."""
        running = RUNNING.get()
        if running is None or running.stack is not self:
            return None
        given = [kwargs.get(name) for name in ("attention_mask", "position_embeddings", "past_key_values")]
        if layer is self.layers[0]:
            running.given, running.result, running.passed = given, None, 0
            if layer.can(hidden, **kwargs) and self._intact():
                running.result = self._run(hidden, *given)
        elif running.result is not None and not running.goes_on(layer, hidden, given):
            raise self._surprised("changes what its layers are given from one to the next")
        running.passed += 1
        return running.result

    def _surprised(self, what: str) -> RuntimeError:
        return RuntimeError(f"{type(self.owner).__name__} {what}: wrap the model with cpu_kernels=False")

    def _intact(self) -> bool:
        """Whether the layers are still those that were joined, each a ``ShortLayer``'s, and nobody listens to them."""
        if [vars(module).get("forward") for module in self.modules] != self.layers:
            return False
        if any(layer.layer.training or _heard(layer.layer) for layer in self.layers):
            return False
        return alone(self.parts) and self._found()

    def runs(self, rows: int) -> bool:
        """Whether so few rows may be ours just now."""
        return self.layers[0].runs(rows)

    def _found(self) -> bool:
        """Whether all weights are where they were, or have been looked up where they are now."""
        if self.addresses == addresses(self.held):
            return True
        if not all(layer.found() for layer in self.layers):
            return False
        self._read()
        return True

    def _run(self, hidden: torch.Tensor, mask: Any, turns: Any, cache: Any) -> torch.Tensor | None:
        """What the last layer says; None, and nothing has happened, where the cache's layers are not alike."""
        batch, nodes, width = hidden.shape
        slots = cache.open(batch, nodes) if type(cache) is SlotCache and len(cache.layers) == len(self.layers) else None
        if slots is None:
            return None
        cos, sin, seen, _ = self.layers[0].shared.read(turns, mask, batch, nodes)
        x = hidden.reshape(batch * nodes, width).contiguous().numpy()
        y = self.through(self.tables, x, cos, sin, seen, slots)
        return torch.from_numpy(y).view(batch, nodes, width)

    def through(
        self,
        tables: Tables,
        x: Float32[np.ndarray, "nodes width"],
        cos: Float32[np.ndarray, "nodes rotated"],
        sin: Float32[np.ndarray, "nodes rotated"],
        seen: Bool[np.ndarray, "rows nodes slots"],
        slots: Open,
        norm: Float32[np.ndarray, " width"] | None = None,
    ) -> Float32[np.ndarray, "nodes width"]:
        """What the last layer says of all rows' nodes, whose keys and values are written to the slots that are open.

        Args:
            tables: where the layers' numbers are.
            seen: the slots that a node may look at; of no rows where all may look at all.
            norm: weight of a norm behind the last layer.
        """
        from specdec.kernels.linear_numba import use_threads  # compiles or loads: on first use
        from specdec.kernels.stack_numba import stack

        assert not len(seen) or seen.shape[2] == slots.shape[2], "a mask has a column for each of the cache's slots"
        use_threads(threads := torch.get_num_threads())
        first, last = self.layers[0], NOTHING if norm is None else norm
        y: np.ndarray = stack(
            x, *tables, first.eps, cos, sin, slots.addresses, slots.strides, slots.shape, slots.starts, seen,
            first.scale, len(first.wq) // first.dim, len(first.wg), last, threads,
        )  # fmt: skip
        return y


def _address(part: np.ndarray) -> int:
    return part.ctypes.data if len(part) else 0


class Running:
    """One pass of a ShortStack.

    Attributes:
        given: the mask, rotary embeddings and cache of the first layer.
        result: what the last layer says; None where layers run one by one.
        passed: how many layers have been called.
    """

    given: Sequence[Any] = ()
    result: torch.Tensor | None = None
    passed = 0

    def __init__(self, stack: ShortStack) -> None:
        self.stack = stack

    def goes_on(self, layer: ShortLayer, hidden: torch.Tensor, given: Sequence[Any]) -> bool:
        """Whether a layer is the next, and given what goes through all of them."""
        expected = self.stack.layers[self.passed] is layer and hidden is self.result
        return expected and all(one is other for one, other in zip(given, self.given, strict=True))


def alike(modules: nn.ModuleList) -> bool:
    """Whether these are several layers, each a ``ShortLayer``'s, that differ in their numbers only."""
    layers: list[Any] = [vars(module).get("forward") for module in modules]
    if len(layers) < 2 or not all(isinstance(layer, ShortLayer) for layer in layers):
        return False
    config = layers[0].attention.config
    if len(set(getattr(config, "layer_types", None) or [])) > 1 or any(
        it.attention.config is not config for it in layers
    ):
        return False
    return len({(layer.shared, *_facts(layer)) for layer in layers}) == 1


def _facts(layer: ShortLayer) -> tuple[Any, ...]:
    return layer.eps, layer.dim, layer.scale, *(part.shape for table in layer.tables for part in table)


def _heard(layer: nn.Module) -> bool:
    """Whether somebody listens to what goes into a layer or comes out of it."""
    if layer._forward_pre_hooks:
        return True
    hooks = layer._forward_hooks.values()
    return bool(hooks) and (_recording() or any(hook.__module__ != RECORDING for hook in hooks))


def _recording() -> bool:
    """Whether transformers takes down hidden states of the pass that is under way."""
    return bool(output_capturing._active_collector.get())
