"""KV rows that live in the host's memory: a layer's are brought to the device while the layer before it is at work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from specdec.cache import SlotCache, SlotLayer, slot_layer

HOST = torch.device("cpu")
TOGETHER = 256  # tokens of a pass whose rows are copied to the host together; of a prompt all may not fit the device


class OffloadedLayer(SlotLayer):
    """One layer's rows in the host's memory, page-locked for a GPU.

    A pass reads a copy on its own device, which ``fetch`` begins to make ahead of time and which is given up as soon as
    the layer has been run. What the pass adds is written to both.

    Attributes:
        reader: the device that passes run on; None before the first.
    """

    def __init__(self, reader: torch.device | None = None) -> None:
        super().__init__()
        self.reader = reader
        self._ahead: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate slots shaped after the first keys and values."""
        self.reader = self.reader or key_states.device
        super().lazy_initialization(key_states, value_states)
        self.device = HOST

    def _slots(self, like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        # Slots come first in memory, so that those in use are one piece, which can be copied while the host goes on.
        shape, locked = (capacity, rows, like.shape[1], like.shape[3]), _is_cuda(self.reader)
        return torch.zeros(shape, dtype=like.dtype, pin_memory=locked).permute(1, 2, 0, 3)

    def fetch(self, room: int) -> None:
        """Begin to copy what is held to the reader's device, with ``room`` for as many tokens more."""
        if self.is_initialized:
            self._ahead = self._fetched(room)

    def _fetched(self, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._copied(self._keys, room), self._copied(self._values, room)

    def _copied(self, slots: torch.Tensor, room: int) -> torch.Tensor:
        held = slots[: len(self.lengths), :, : max(self.lengths)].permute(2, 0, 1, 3)
        copy = torch.zeros((len(held) + room, *held.shape[1:]), dtype=slots.dtype, device=self.reader)
        copy[: len(held)].copy_(held, non_blocking=True)
        return copy.permute(1, 2, 0, 3)

    def update(
        self,
        key_states: Float[torch.Tensor, "b h n d"],
        value_states: Float[torch.Tensor, "b h n e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a ``SlotLayer``'s, but what is returned is on the device of ``key_states``."""
        read = self.read(key_states, value_states)
        self.add(key_states, value_states)
        return read

    def read(
        self, key_states: Float[torch.Tensor, "b h n d"], value_states: Float[torch.Tensor, "b h n e"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held and a pass's keys and values behind it, on the device of those, which are not held yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = key_states.shape[-2]
        read, self._ahead = self._ahead or self._fetched(n), None
        if read[0].shape[2] != max(self.lengths) + n:
            read = self._fetched(n)
        for rows, states in zip(read, (key_states, value_states), strict=True):
            self._write(rows, states)
        return read

    def add(self, keys: Float[torch.Tensor, "b h n d"], values: Float[torch.Tensor, "b h n e"]) -> None:
        """Hold a pass's keys and values, from whatever device."""
        super().update(keys, values)

    def _show(self, first: int | None = None, end: int | None = None) -> None:
        self._ahead = None  # it is of rows that are others now
        super()._show(first, end)


class OffloadedCache(SlotCache):
    """A ``SlotCache`` whose rows live in the host's memory, but for those of layers with windows, which are few.

    It takes the place of transformers' ``DynamicCache(offloading=True)``, which ``cache_implementation="offloaded"``
    asks for. A pass over it reads all rows across the bus, so that a draft that is right saves as many readings; with a
    ``TriForceDrafter`` the rows that drafts read stay on the device. Not yet run on a GPU.
    """

    @classmethod
    def of(cls, cache: Cache) -> OffloadedCache | None:
        """An OffloadedCache with the layers and contents of ``cache``; None where it has layers of another kind."""
        layers = [_layer(layer) for layer in cache.layers] if type(cache) is DynamicCache else []
        return None if not layers or None in layers else cls(layers=layers)

    def hand_back(self, cache: Cache) -> None:
        """Leave the rows in the user's own ``cache``, as plain ``generate`` would. All rows must be equally long."""
        super().hand_back(cache)
        for layer, slots in zip(cache.layers, self.layers, strict=True):
            if isinstance(slots, OffloadedLayer):
                layer.device = slots.reader

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        """Where rows are copied while the device goes on with its work; None on the CPU."""
        reader = next((layer.reader for layer in self.layers if isinstance(layer, OffloadedLayer)), None)
        if not _is_cuda(reader):
            return None
        if self._copying is None:
            self._copying = torch.cuda.Stream(reader)  # type: ignore[no-untyped-call]
        return self._copying

    _copying: torch.cuda.Stream | None = None
    _added: tuple[tuple[OffloadedLayer, torch.Tensor, torch.Tensor], ...] = ()  # by the pass that is at work

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As any cache's; the next layer's rows are on their way when it returns.

        What a pass over a few tokens adds is held when its last layer has been run.
        """
        stream, layer = self._stream, self.layers[layer_idx]
        if stream is not None:
            torch.cuda.current_stream(key_states.device).wait_stream(stream)
        together = isinstance(layer, OffloadedLayer) and key_states.shape[-2] <= TOGETHER
        states: tuple[torch.Tensor, torch.Tensor]
        if together:
            states = layer.read(key_states, value_states)
        else:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if stream is not None:
            for rows in states:
                rows.record_stream(torch.cuda.current_stream(key_states.device))  # it was allocated for the other one
        following = self.layers[layer_idx + 1] if layer_idx + 1 < len(self.layers) else None
        if isinstance(following, OffloadedLayer):
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                following.fetch(key_states.shape[-2])
        if together:
            self._add(layer, key_states, value_states)
        return states

    def _add(self, layer: OffloadedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Remember what a pass adds to a layer; after the last layer, hold what it has added to all."""
        layers = [each for each in self.layers if isinstance(each, OffloadedLayer)]
        self._added = (*(() if layer is layers[0] else self._added), (layer, keys, values))
        if layer is layers[-1]:
            home = iter(self._brought_home([states for _, *pair in self._added for states in pair]))
            for each, *_ in self._added:
                each.add(next(home), next(home))
            self._added = ()

    def _brought_home(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies in the host's memory: in one piece, so that it waits for the device once."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            piece = torch.cat([each.flatten() for each in states])
            home = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=stream is not None)
            home.copy_(piece, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        parts = torch.split(home, [each.numel() for each in states])
        return [part.view(each.shape) for part, each in zip(parts, states, strict=True)]


def slots_of(cache: Cache) -> SlotCache | None:
    """A SlotCache with the layers and contents of ``cache``, where ``cache`` would hold them; None if none can."""
    return OffloadedCache.of(cache) if getattr(cache, "offloading", False) else SlotCache.of(cache)


def _layer(layer: Any) -> Any:
    if type(layer) is not DynamicLayer:
        return slot_layer(layer)
    slots = OffloadedLayer(getattr(layer, "device", None) if layer.is_initialized else None)
    if layer.get_seq_length() > 0:
        slots.adopt(layer.keys, layer.values, layer.get_seq_length())
    return slots


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"
