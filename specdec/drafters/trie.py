"""A forest of counted n-grams that never outgrows its bytes."""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
from jaxtyping import Int, Int32

from specdec.drafters import trie_numba as kernels

PIECE = 64  # tokens counted at a time: there must be room for whatever they bring
NODE_BYTES = 4 * (kernels.COLUMNS + 1)  # a row, and a bucket


class Trie:
    """How often each n-gram occurred, in a tree for each first token.

    Room is doubled until ``max_bytes`` are used. From then on trees are squeezed in turn: counts are halved and what
    was counted only once goes, so what recurs outlives what does not.

    Args:
        longest: longest n-gram, in tokens.
        largest: nodes of one tree at most; a larger one is squeezed at once.
        max_bytes: bytes of the whole.

    Attributes:
        arrays: what the kernels work on: nodes, buckets and state.
        lock: held by whoever counts or looks up, where threads share a trie.

    Raises:
        ValueError: too few bytes for n-grams so long.
    """

    def __init__(self, longest: int, largest: int, max_bytes: int):
        self.longest, self.largest = longest, largest
        self._most, self._room = max_bytes // NODE_BYTES, (PIECE + longest) * longest
        if self._most < self._room:
            least = self._room * NODE_BYTES
            raise ValueError(f"n-grams of {longest} tokens need max_bytes of at least {least}, got {max_bytes}")
        self.lock = threading.Lock()
        self._clear(self._room)

    def count(self, tokens: Int[np.ndarray, " length"], known: int) -> None:
        """Count the n-grams that end at position ``known`` or later; those that end before were counted."""
        known = self.prepare(tokens, known)
        kernels.count_ngrams(self.arrays, tokens, known, self.longest, self.largest)

    def prepare(self, tokens: Int[np.ndarray, " length"], known: int) -> int:
        """``count`` what is new but for the last piece, and make room for that; the position where it begins."""
        while len(tokens) - known > PIECE:
            self._make_room()
            kernels.count_ngrams(self.arrays, tokens[: known + PIECE], known, self.longest, self.largest)
            known += PIECE
        if known < len(tokens):
            self._make_room()
        return known

    @property
    def bytes_used(self) -> int:
        return sum(array.nbytes for array in self.arrays[:2])

    def rows(self) -> Int32[np.ndarray, "nodes 3"]:
        """The nodes, parents first: token, row of the parent and count of each."""
        return cast(np.ndarray, kernels.flatten(self.arrays))

    def fill(self, rows: Int32[np.ndarray, "nodes 3"]) -> None:
        """Become what another trie's ``rows`` say, as far as there is room.

        Raises:
            ValueError: they are no forest of n-grams of at most ``longest`` tokens. Then nothing of use is left here.
        """
        if rows.dtype != np.int32 or rows.ndim != 2 or rows.shape[1] != 3:
            raise ValueError(f"a trie's rows are int32 [nodes, 3], got {rows.dtype} {list(rows.shape)}")
        self._clear(max(self._room, len(rows)))
        if not kernels.unflatten(rows, self.arrays, self.longest):
            raise ValueError(f"these {len(rows)} rows are no forest of n-grams of at most {self.longest} tokens")
        if len(rows) > self._most:
            kernels.make_room(self.arrays, len(rows) - self._most)
            self.fill(self.rows())

    def _clear(self, rows: int) -> None:
        """An empty forest with room for so many nodes."""
        buckets = np.full(rows, kernels.NONE, np.int32)
        nodes = np.empty((rows, kernels.COLUMNS), np.int32)
        self.arrays: kernels.Arrays = nodes, buckets, kernels.EMPTY.copy()

    def _make_room(self) -> None:
        """Room for what one piece of text may bring."""
        old = self.arrays
        rows = len(old[0])
        if rows - old[2][kernels.LIVE] >= self._room:
            return
        if rows < self._most:
            self._clear(min(2 * rows, self._most))
            for before, after in zip(old, self.arrays, strict=True):
                after[: len(before)] = before
        kernels.make_room(self.arrays, self._room)
