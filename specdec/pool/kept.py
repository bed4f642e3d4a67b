"""KV rows of texts that have been answered, for prompts that begin as these do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from transformers.cache_utils import DynamicCache

from specdec.cache import Rows
from specdec.prefix import CROPPED, common, first_needed

ALIKE = 32  # tokens that must be alike for a prompt to begin behind another text's rows


@dataclass(frozen=True, slots=True, eq=False)
class KeptText:
    """A text and its rows.

    Attributes:
        reader: whose the rows are: another namespace, adapter, dtype or device has others.
        layers: the rows of each layer; None for layers that hold none.
    """

    reader: str
    tokens: Int[np.ndarray, " length"]
    layers: tuple[Rows | None, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its rows."""
        return sum(rows.keys.nbytes + rows.values.nbytes for rows in self.layers if rows is not None)


class Kept:
    """Texts with their rows, those that were of use last kept longest.

    Args:
        max_bytes: of all rows.

    Attributes:
        texts: the longest unused first.
        bytes_used: of their rows.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes_used = max_bytes, 0
        self.texts: list[KeptText] = []

    def keep(self, text: KeptText, room: int) -> None:
        """Copy a text's rows, in place of those it goes on from, if they fit into ``room`` bytes beside no others."""
        room = min(room, self.max_bytes)
        if text.bytes > room:
            return
        for each in [each for each in self.texts if each.reader == text.reader]:
            if common(text.tokens, each.tokens) == len(each.tokens):
                self._drop(each)
        self.shrink(room - text.bytes)
        copies = (rows and Rows(rows.first, rows.keys.clone(), rows.values.clone()) for rows in text.layers)
        self.texts.append(KeptText(text.reader, text.tokens.copy(), tuple(copies)))
        self.bytes_used += text.bytes

    def longest(
        self, reader: str, tokens: Int[np.ndarray, " length"], least: int = ALIKE
    ) -> tuple[int, KeptText | None]:
        """How much of a prompt the best text begins with, if ``least`` or more, and that text, now of use."""
        ours = [(common(each.tokens, tokens), each) for each in self.texts if each.reader == reader]
        length, best = max(ours, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < least:
            return 0, None
        self.texts.remove(best)
        self.texts.append(best)
        return length, best

    def shrink(self, room: int) -> None:
        """Drop the longest unused until no more than ``room`` bytes are held."""
        while self.texts and self.bytes_used > room:
            self._drop(self.texts[0])

    def clear(self) -> None:
        """Drop all."""
        self.shrink(-1)

    def _drop(self, text: KeptText) -> None:
        self.texts.remove(text)
        self.bytes_used -= text.bytes


def fill(cache: DynamicCache, layers: Sequence[Rows | None], length: int) -> bool:
    """Put the rows of a text's first tokens into an empty cache; whether that can be done, for if not it stays empty.

    The rows are not copied: the cache copies them when it is next written to.
    """
    if len(cache.layers) != len(layers) or any(type(layer) not in CROPPED for layer in cache.layers):
        return False
    held = [(layer, rows) for layer, rows in zip(cache.layers, layers, strict=True) if rows is not None]
    needed = [first_needed(layer, length) for layer, _ in held]
    if any(rows.first > first for (_, rows), first in zip(held, needed, strict=True)):
        return False
    for (layer, rows), first in zip(held, needed, strict=True):
        part = slice(first - rows.first, length - rows.first)
        layer.lazy_initialization(rows.keys, rows.values)
        layer.keys, layer.values = rows.keys[:, :, part], rows.values[:, :, part]
        if layer.is_sliding:
            layer.cumulative_length = length
    return True
