"""KV rows of a text's first tokens and its newest ones: constant memory, however long the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from specdec.cache import GROWTH, SlotCache, SlotLayer


class StreamingLayer(SlotLayer):
    """One layer's rows: ``sinks`` first tokens, then the newest ones, in slots next to one another.

    ``offset`` counts what has been dropped, so the newest token of a text of n is in slot ``n - offset - 1`` as in any
    ``SlotLayer``; the sinks are in the first slots. Only what was there before the newest pass is ever dropped.

    Args:
        sinks, recent, slack: see ``StreamingCache``.
        window: of a layer that looks back no further anyway; None for others.
    """

    def __init__(self, sinks: int, recent: int, slack: int, window: int | None = None) -> None:
        super().__init__(window)
        self.sinks, self.recent, self.slack = sinks, recent, slack

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a pass's keys and values behind each row's length; where nobody calls ``keep``, room is made first."""
        if self.is_initialized:
            self._slide()
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As ``SlotLayer``'s, with room made, since masks are made before the first layer's ``update``."""
        if self.is_initialized:
            self._slide()
        return super().get_mask_sizes(query_length)

    def keep(self, base: Sequence[int], paths: Sequence[Sequence[int]], moves: torch.Tensor | None) -> None:
        """As ``SlotLayer``'s. Raises ValueError where ``base`` goes back to tokens that have been dropped."""
        if self.offset and min(base) < self.offset + self.sinks:
            raise ValueError(f"cannot go back to token {min(base)}: those before {self.offset + self.sinks} are gone")
        super().keep(base, paths, moves)

    def join(self, other: SlotLayer) -> None:
        """Refused: which slots were dropped is the same for all rows."""
        raise ValueError("a row cannot join a streaming cache: its sinks would be other tokens")

    def _slide(self) -> None:
        """Drop the oldest tokens but the sinks once ``slack`` too many are held."""
        dropped = min(self.lengths) - self.offset - self.sinks - self.recent
        if dropped <= self.slack:
            return
        end, room = max(self.lengths) - self.offset, self.sinks + self.recent + self.slack + GROWTH
        self._keys, self._values = (self._without(slots, dropped, end, room) for slots in (self._keys, self._values))
        self.offset += dropped
        self._show()

    def _without(self, slots: torch.Tensor, dropped: int, end: int, room: int) -> torch.Tensor:
        """The slots up to ``end`` without those dropped; in smaller buffers after a long pass."""
        newest = slots[:, :, self.sinks + dropped : end].clone()
        if slots.shape[2] > 2 * room and end - dropped <= room:
            fewer = self._slots(slots, len(slots), room)
            fewer[:, :, : self.sinks] = slots[:, :, : self.sinks]
            slots = fewer
        slots[:, :, self.sinks : end - dropped] = newest
        return slots


class StatesAndStreamingRows(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Recurrent states, and ``rows`` that do not grow with the text, for models whose layers have both."""

    def __init__(self, states: LinearAttentionAndFullAttentionLayer, rows: StreamingLayer) -> None:
        self.__dict__.update(vars(states))
        self.rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a pass's keys and values; return all that are held."""
        return self.rows.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens of the text."""
        return self.rows.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As its rows'."""
        return self.rows.get_mask_sizes(query_length)


class StreamingCache(SlotCache):
    """Attention sinks and a recent window: a cache for texts without left padding.

    It serves plain ``generate`` (``past_key_values=StreamingCache()``) and a ``Model`` alike. What it holds after
    ``keep`` depends on what was kept alone: a rejected draft leaves no trace, and costs no token of the window. Feed
    long prompts in pieces, since a pass takes room for all of its own tokens.

    Xiao et al. 2023, arXiv 2309.17453. There, and in TriForce's smallest drafter, keys are kept unrotated and
    positions are counted within the cache, so that no position exceeds what the model was trained on. Here keys stay as
    they were computed, rotated to their own place in the text: that is exactly full attention with the dropped
    tokens masked, right for a text within the model's positions.

    Args:
        sinks: first tokens that are never dropped.
        recent: newest tokens held at least.
        slack: how many more may be held before the oldest are dropped, all at once; as many as a draft has nodes, at
            least, if levels of a tree are fed one by one.
        config: of a model some of whose layers do not look back without limit: those with windows hold their windows,
            and recurrent states are as in any cache, so that only plain ``generate`` can use it then. None
            for a model of full-attention layers.

    Raises:
        ValueError: no recent token, or negative numbers.
    """

    def __init__(self, sinks: int = 4, recent: int = 508, slack: int = 64, config: Any = None) -> None:
        if sinks < 0 or recent < 1 or slack < 0:
            raise ValueError(f"sinks={sinks}, recent={recent}, slack={slack}: give at least 0, 1 and 0")
        full = partial(StreamingLayer, sinks, recent, slack)
        if config is None:
            super().__init__(layer_class_to_replicate=full)
        else:
            super().__init__(layers=[_instead(layer, full, slack) for layer in DynamicCache(config=config).layers])


def _instead(layer: CacheLayerMixin, full: Callable[[], StreamingLayer], slack: int) -> CacheLayerMixin:
    """What takes the place of a layer of transformers' own cache."""
    if type(layer) is DynamicSlidingWindowLayer:
        return StreamingLayer(0, layer.sliding_window, slack, layer.sliding_window)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return StatesAndStreamingRows(layer, full())
    return full() if type(layer) is DynamicLayer else layer
