"""The target's KV rows: written in place, kept by path, ragged over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from specdec.kernels.move_rows import move_rows, move_rows_of_all

GROWTH = 256  # spare slots made whenever a buffer must grow
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)  # has no rows; before transformers 5.23 there was none such


class Rows(NamedTuple):
    """One text's keys and values in one layer, each [1, heads, tokens, width], from its token ``first`` on."""

    first: int
    keys: torch.Tensor
    values: torch.Tensor


class Open(NamedTuple):
    """Where the nodes of a pass go in all layers alike, for who writes them there in person.

    Attributes:
        addresses: of the first key and the first value of each layer, [layers, 2].
        strides: numbers from one row, head or slot to the next.
        shape: rows, heads, slots that attention may look at, and numbers in a head.
        starts: the slot of each row's first node.
    """

    addresses: Int[np.ndarray, "layers 2"]
    strides: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    starts: Int[np.ndarray, " rows"]


class Memory(NamedTuple):
    """Where a layer's buffers are.

    Attributes:
        keys, values: the buffers.
        addresses: of their first numbers.
        shape: of both; () where they are not alike, dense, and float32 on the CPU.
    """

    keys: torch.Tensor
    values: torch.Tensor
    addresses: tuple[int, int]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Memory:
        """Look them up."""
        both = keys, values
        dense = all(each.is_contiguous() and each.dtype == torch.float32 and each.device.type == "cpu" for each in both)
        shape = tuple(keys.shape) if dense and keys.shape == values.shape else ()
        return cls(keys, values, (keys.data_ptr(), values.data_ptr()), shape)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values in preallocated slots, one length per batch row.

    Slot ``i`` of a row holds the row's token ``offset + i``. A pass writes its nodes behind each row's own length;
    ``keep`` moves the accepted ones down and forgets the rest. With a ``window``, tokens that no row can attend to
    any more are dropped from the front, a slackful at a time, so that a rejected draft never costs history. Rows may
    ``join`` and ``leave`` between passes; the buffers have room for some more rows than there are.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        self.is_initialized = False  # not by the base class: it keeps keys and values, which are views here
        self.window = window
        self.is_sliding = window is not None
        self.lengths: list[int] = [0]
        self.offset = 0
        self._shown = 0, 0
        self._memory: Memory | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate slots shaped after the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.lengths = self.lengths * key_states.shape[0] if len(self.lengths) == 1 else self.lengths
        rows, capacity = len(key_states), key_states.shape[-2] + GROWTH
        self._keys, self._values = (self._slots(like, rows, capacity) for like in (key_states, value_states))
        self.is_initialized = True

    def _slots(self, like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        # Zeros: a masked slot still meets a zero weight in the sum over values, and 0 * NaN is NaN.
        return like.new_zeros((rows, like.shape[1], capacity, like.shape[-1]))

    @property
    def keys(self) -> torch.Tensor:
        """Keys of the slots that attention may look at, [rows, heads, slots, width]; a view."""
        return self._view(self._keys)

    @property
    def values(self) -> torch.Tensor:
        """Their values."""
        return self._view(self._values)

    def _view(self, slots: torch.Tensor) -> torch.Tensor:
        rows, (first, end) = len(self.lengths), self._shown
        held = slots if len(slots) == rows else slots[:rows]
        return held.narrow(2, first, end - first)  # quicker than an index

    def update(
        self,
        key_states: Float[torch.Tensor, "b h n d"],
        value_states: Float[torch.Tensor, "b h n e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a pass's keys and values behind each row's length; return all slots up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, top, first = key_states.shape[-2], max(self.lengths), self._first() - self.offset
        end = top - self.offset + n
        self._reserve(end)
        self._write(self._keys, key_states)
        self._write(self._values, value_states)
        self.lengths = [length + n for length in self.lengths]
        self._show(first, end)
        return self.keys, self.values

    def like(self, other: SlotLayer) -> bool:
        """Whether it holds the same tokens as another, keys and values in alike buffers of float32 on the CPU."""
        if not self.is_initialized or not other.is_initialized or self.lengths != other.lengths:
            return False
        shape = self.memory.shape
        return len(shape) > 0 and shape == other.memory.shape and self.offset == other.offset

    def __getstate__(self) -> dict[str, Any]:
        """All but where the buffers are: a copy has its own."""
        return {**vars(self), "_memory": None}

    @property
    def memory(self) -> Memory:
        """Where the buffers are; looked up once for each pair of them."""
        if self._memory is None or self._memory.keys is not self._keys or self._memory.values is not self._values:
            self._memory = Memory.of(self._keys, self._values)
        return self._memory

    def _write(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Put a pass's keys, or values, behind each row's length."""
        n, top = states.shape[-2], max(self.lengths) - self.offset
        if min(self.lengths) - self.offset == top:
            slots[: len(self.lengths), :, top : top + n] = states
            return
        for row, length in enumerate(self.lengths):
            start = length - self.offset
            slots[row, :, start : start + n] = states[row]

    def _first(self) -> int:
        """The first token that the next pass of any row may look at."""
        return self.offset if self.window is None else max(self.offset, min(self.lengths) - self.window + 1)

    def _reserve(self, end: int) -> None:
        if end > self._keys.shape[2]:
            self._move(self.offset, len(self._keys), end + max(GROWTH, end // 2))

    def _move(self, offset: int, rows: int, capacity: int) -> None:
        """Copy what is held to fresh buffers of so many rows and slots, from token ``offset`` on."""
        start, end = max(offset, self.offset), max(self.lengths)
        old = self._keys, self._values
        self._keys, self._values = (self._slots(slots, rows, capacity) for slots in old)
        for slots, before in zip((self._keys, self._values), old, strict=True):
            held = before[:, :, start - self.offset : end - self.offset]
            slots[: len(before), :, start - offset : end - offset] = held
        self.offset = offset

    def join(self, other: SlotLayer) -> None:
        """Copy the only row of another layer, which becomes the last of this one's."""
        first, (end,), row = other._first(), other.lengths, len(self.lengths)
        offset, capacity = min(self.offset, first), self._keys.shape[2]
        need = max(end, *self.lengths) - offset
        if row == len(self._keys) or need > capacity or offset < self.offset:
            capacity = need + max(GROWTH, need // 2) if need > capacity else capacity
            self._move(offset, len(self._keys) * (2 if row == len(self._keys) else 1), capacity)
        self.lengths = [*self.lengths, end]
        for slots, theirs in ((self._keys, other._keys), (self._values, other._values)):
            slots[row, :, first - offset : end - offset] = theirs[0, :, first - other.offset : end - other.offset]
        self._show()

    def repeat(self, rows: int) -> None:
        """Hold the only row so many times; the copies are made when one of them is next written to."""
        end = self.lengths[0] - self.offset
        self._keys, self._values = (slots[:, :, :end].expand(rows, -1, -1, -1) for slots in (self._keys, self._values))
        self.lengths = self.lengths * rows
        self._show()

    def leave(self, row: int) -> None:
        """Forget a row, wholly; the last one takes its place. Not for the only row."""
        last = len(self.lengths) - 1
        for slots in (self._keys, self._values):
            slots[row] = slots[last]
            slots[last] = 0  # who comes next must not meet what is no number, nor anybody else's text
        # A new list: layers of one cache may share one.
        self.lengths = [self.lengths[last] if i == row else length for i, length in enumerate(self.lengths[:last])]
        self._show()

    def keep(self, base: Sequence[int], paths: Sequence[Sequence[int]], moves: torch.Tensor | None) -> None:
        """Keep, of the nodes written behind ``base``, each row's path; ``moves`` has them too, if any is displaced."""
        if moves is not None:
            first = torch.tensor(base, device=self.device) - self.offset
            rows = len(self.lengths)
            move_rows(self._keys[:rows], self._values[:rows], moves.to(self.device), first)
        self.lengths = [length + len(path) for length, path in zip(base, paths, strict=True)]
        self._show()
        self._slide()

    def _slide(self) -> None:
        if self.window is None:
            return
        front = self._first() - self.offset
        if front >= GROWTH:
            end = max(self.lengths) - self.offset
            self._move(self.offset + front, len(self._keys), end - front + 2 * GROWTH)
            self._show()

    def _show(self, first: int | None = None, end: int | None = None) -> None:
        """Let attention see some slots of all rows: from the first in reach to the longest row's end, if not said."""
        self._shown = (
            self._first() - self.offset if first is None else first,
            max(self.lengths) - self.offset if end is None else end,
        )

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Start from another cache's rows, the last of ``length`` tokens; they are copied, to where others were."""
        self.lengths, self.offset = [length] * keys.shape[0], length - keys.shape[2]
        if not self.is_initialized or not (_holds(self._keys, keys) and _holds(self._values, values)):
            self.lazy_initialization(keys, values)
        self._keys[:, :, : keys.shape[2]] = keys
        self._values[:, :, : keys.shape[2]] = values
        self._show()

    def rows(self, row: int) -> Rows:
        """One row's keys and values, those in reach of its next token at least; views."""
        length = self.lengths[row]
        first = self.offset if self.window is None else max(self.offset, length - self.window + 1)
        part = slice(first - self.offset, length - self.offset)
        return Rows(first, self._keys[row : row + 1, :, part], self._values[row : row + 1, :, part])

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots of keys and of values, spare ones among them."""
        return self._keys, self._values

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, spare slots among them."""
        return self._keys.nbytes + self._values.nbytes

    def move_to(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy what is held to somebody else's buffers with room for it, and write there from now on."""
        rows, end = len(self.lengths), max(self.lengths) - self.offset
        keys[:rows, :, :end], values[:rows, :, :end] = self._keys[:rows, :, :end], self._values[:rows, :, :end]
        self._keys, self._values = keys, values
        self._show()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass over ``query_length`` tokens sees, and the token that the first of them holds."""
        first = self._first()
        return self.get_seq_length() - first + query_length, first

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def get_max_length(self) -> int:
        """No maximum, or the window."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every row."""
        self.lengths = [length - abs(tokens_to_remove) for length in self.lengths]
        if self.is_initialized:
            self._show()


class SlotCache(Cache):  # type: ignore[misc]
    """A transformers cache made of SlotLayers: what the tree pass writes to and keeps paths in."""

    @classmethod
    def of(cls, cache: Cache) -> SlotCache | None:
        """A SlotCache with the layers and contents of ``cache``; None where it has layers of another kind."""
        if type(cache).__name__ not in ("DynamicCache", "SlotCache") or getattr(cache, "offloading", False):
            return None
        if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
            return cls(layer_class_to_replicate=SlotLayer)
        layers = [slot_layer(layer) for layer in cache.layers]
        return None if None in layers else cls(layers=layers)

    @property
    def slots(self) -> list[SlotLayer]:
        """The layers that hold rows; others share an earlier layer's."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def lengths(self) -> list[int]:
        """Tokens held, per batch row."""
        return list(self.slots[0].lengths)

    def open(self, rows: int, nodes: int) -> Open | None:
        """Count so many nodes behind each row's length as written in all layers, and say where.

        None, and nothing has happened, where the layers do not hold the same tokens of so many rows in alike buffers of
        float32 on the CPU, or look back no further than a window.
        """
        layers = self.slots
        if not layers or len(layers) < len(self.layers) or len(layers[0].lengths) != rows:
            return None
        first = layers[0]
        if any(type(layer) is not SlotLayer or layer.window is not None or not layer.like(first) for layer in layers):
            return None
        lengths, starts = [length + nodes for length in first.lengths], np.array(first.lengths) - first.offset
        end = max(lengths) - first.offset
        for layer in layers:
            layer._reserve(end)
            layer.lengths, layer._shown = lengths, (0, end)
        _, heads, capacity, dim = first.memory.shape
        strides = heads * capacity * dim, capacity * dim, dim
        addresses = np.array([layer.memory.addresses for layer in layers])
        return Open(addresses, strides, (rows, heads, end, dim), starts)

    def keep(self, base: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Of the nodes a pass wrote behind the rows' lengths ``base``, keep each row's path and forget the rest."""
        layers = [layer for layer in self.slots if layer.is_initialized]
        moves = _padded(paths) if any(map(_displaced, paths)) else None
        if moves is not None and all(type(layer) is SlotLayer and layer.like(layers[0]) for layer in layers):
            buffers = [slots for layer in layers for slots in layer.buffers]
            move_rows_of_all(buffers, moves, torch.tensor(base) - layers[0].offset)
            moves = None
        for layer in layers:
            layer.keep(base, paths, moves)

    def join(self, other: SlotCache) -> None:
        """Copy the only row of another cache of the same model, which becomes the last of this one's."""
        for layer, theirs in zip(self.slots, other.slots, strict=True):
            if layer.is_initialized:
                layer.join(theirs)

    def leave(self, row: int) -> None:
        """Forget a row, wholly; the last one takes its place. Not for the only row."""
        for layer in self.slots:
            if layer.is_initialized:
                layer.leave(row)

    def rows(self, row: int) -> tuple[Rows | None, ...]:
        """One row's keys and values in each layer, as views; None where a layer holds none."""
        return tuple(
            layer.rows(row) if isinstance(layer, SlotLayer) and layer.is_initialized else None for layer in self.layers
        )

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, spare slots among them."""
        return sum(layer.bytes for layer in self.slots if layer.is_initialized)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and slots that the largest of the buffers have room for."""
        shapes = [layer._keys.shape for layer in self.slots if layer.is_initialized]
        return max((shape[0] for shape in shapes), default=0), max((shape[2] for shape in shapes), default=0)

    @property
    def bytes_of_token(self) -> int:
        """Bytes of one token of one row, in all layers."""
        held = [slots for layer in self.slots if layer.is_initialized for slots in (layer._keys, layer._values)]
        return sum(slots[0, :, 0].nbytes for slots in held)

    def hand_back(self, cache: Cache) -> None:
        """Leave the rows in the user's own ``cache``, as plain ``generate`` would. All rows must be equally long."""
        while len(cache.layers) < len(self.layers):
            cache.layers.append(cache.layer_class_to_replicate())
        for layer, slots in zip(cache.layers, self.layers, strict=True):
            if isinstance(slots, SlotLayer) and slots.is_initialized:
                slots._show()  # after a prompt alone, a window still shows all of it
                _fill(layer, slots)


def _holds(slots: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether a buffer has room for some rows, and is of their kind."""
    alike = slots.dtype == rows.dtype and slots.device == rows.device and slots.shape[:2] == rows.shape[:2]
    return alike and slots.shape[3] == rows.shape[3] and slots.shape[2] >= rows.shape[2]


def _displaced(path: Sequence[int]) -> bool:
    """Whether a path's nodes are in other slots than where it must end."""
    return any(node != i for i, node in enumerate(path))


def _padded(paths: Sequence[Sequence[int]]) -> Int[torch.Tensor, "rows length"]:
    """Paths of several lengths as one tensor, -1 after each one's end."""
    longest = max(map(len, paths))
    return torch.tensor([[*path, *[-1] * (longest - len(path))] for path in paths])


def slot_layer(layer: CacheLayerMixin) -> CacheLayerMixin | None:
    """A SlotLayer with what another layer holds; None where that is of a kind that cannot be cut back."""
    if type(layer) is DummyLayer:
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    slots = SlotLayer(getattr(layer, "sliding_window", None))
    if layer.get_seq_length() > 0:
        slots.adopt(layer.keys, layer.values, layer.get_seq_length())
    return slots


def _fill(layer: CacheLayerMixin, slots: SlotLayer) -> None:
    keys, values = slots.keys, slots.values
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = slots.get_seq_length()
