"""How often everything up to a certain length occurred in some sequences: a suffix tree with counts."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float32, Int

from specdec.drafters import suffix_draft_numba, suffix_tree_numba
from specdec.drafters.suffix_tree_numba import (
    COUNT,
    END,
    GROWING,
    HEAD,
    LENGTH,
    LIVE,
    MATCHED,
    MAX_DEPTH,
    NEXT,
    NODE_ROOM,
    NODES,
    NONE,
    OLDEST,
    RUN_ROOM,
    RUNS,
    SIZE,
    START,
    TOKEN,
    TOKEN_ROOM,
    Arrays,
)

LARGEST = 2**31 - 2  # a store's positions and a tree's nodes are int32


class Draft(NamedTuple):
    """A drafted tree, as the kernels leave it where there was room for more.

    Attributes:
        nodes: each node's token, parent and kind, the root first; a kind tells how sure a guess is, as
            ``suffix_draft_numba`` numbers it.
        paths: how often each path was seen, of the times its match was; or what that is corrected to.
        size: how many nodes there are.
        score: the sum of the guesses' probabilities.
        match: how many of the context's last tokens were looked up for it.
    """

    nodes: Int[np.ndarray, "3 room"]
    paths: Float32[np.ndarray, " room"]
    size: int
    score: float
    match: int

    @property
    def tokens(self) -> Int[np.ndarray, " nodes"]:
        return self.nodes[0, : self.size]

    @property
    def parents(self) -> Int[np.ndarray, " nodes"]:
        return self.nodes[1, : self.size]

    @property
    def kinds(self) -> Int[np.ndarray, " nodes"]:
        return self.nodes[2, : self.size]

    @property
    def probability(self) -> Float32[np.ndarray, " nodes"]:
        return self.paths[: self.size]


NO_DRAFT = Draft(np.zeros((3, 1), np.int64), np.ones(1, np.float32), 0, 0.0, 0)


def most_guesses(max_depth: int, factor: float, offset: float) -> int:
    """How many tokens are drafted at most, which is after the longest match."""
    return max(0, int((max_depth - 1) * factor + offset + 1e-6))


class SuffixTree:
    """The counts of all n-grams of some sequences, up to ``max_depth`` tokens, in time and memory linear in the tokens.

    Sequences are appended one after the other, the newest token by token; the oldest can be forgotten, exactly: all
    counts are then as if it had never been. A token takes about 50 to 150 bytes. Not safe to be used by several threads
    at once.

    Args:
        max_depth: longest n-gram.
        max_bytes: memory to use at most, None for any.

    Attributes:
        sequences: how many ended sequences are in the tree.
        block: all of it, int32.

    Raises:
        ValueError: max_depth below 2, or less than 512 bytes per level.
    """

    def __init__(self, max_depth: int = 64, max_bytes: int | None = None):
        if max_depth < 2:
            raise ValueError(f"max_depth must be at least 2, a token of match and one of guess, got {max_depth}")
        if max_bytes is not None and max_bytes < 512 * max_depth:
            raise ValueError(f"max_bytes must be at least 512 * max_depth = {512 * max_depth}, got {max_bytes}")
        self.max_depth, self.sequences, self._max_bytes = max_depth, 0, max_bytes
        self.block = self._empty(4 * max_depth, 4 * max_depth, 4 * max_depth)
        self.block[[LIVE, NODES, RUNS]] = 1  # the root, and no run 0

    def extend(self, tokens: Int[np.ndarray, " new"]) -> int:
        """Append tokens, from 0 to 2**31 - 1, to the newest sequence; how many there was room for: all, if any."""
        tokens = tokens.astype(np.int32)  # one type for the kernels
        done = int(suffix_tree_numba.extend(self.block, tokens))
        while done < len(tokens) and self._grow(len(tokens) - done):
            done += suffix_tree_numba.extend(self.block, tokens[done:])
        return done

    def end(self) -> None:
        """End the newest sequence, if it has tokens; the next token begins another."""
        if self.growing:
            self.block[SIZE] += 1  # what stands there is END
            self.block[GROWING] = self.block[MATCHED] = 0
            self.sequences += 1

    def forget(self) -> None:
        """Forget the oldest of the ended sequences, if there is one."""
        if self.sequences:
            oldest = int(self.block[OLDEST])
            stop = oldest + int(np.argmax(self.arrays.tokens[oldest:] == END)) + 1
            self.sequences -= suffix_tree_numba.forget(self.block, stop)

    def draft(
        self,
        context: Int[np.ndarray, " length"],
        nodes: int,
        depth: int,
        width: int,
        factor: float = 1.0,
        offset: float = 0.0,
        min_probability: float = 0.1,
        own: SuffixTree | None = None,
        newest: int = 0,
    ) -> Draft:
        """The continuation with the best score, of those after every match of the context's last tokens.

        Of equal scores that of the longest match wins.

        Args:
            context: what to continue, not empty; the whole of it is no pattern.
            nodes, depth, width: guesses at most, on one path at most, and after one token at most.
            factor, offset: after a match of n tokens, at most ``factor * n + offset`` guesses.
            min_probability: of a path, below which it is not drafted.
            own: the tree of the context itself, of the same depth, which is asked, too, and wins where it is as good.
            newest: how many of the context's last tokens are this tree's newest sequence, the whole of it; 0 for none.
                That makes it quicker, and changes nothing.
        """
        nothing = SuffixTree(self.max_depth)
        own, last = own or nothing, context[-self.max_depth :].astype(np.int32)
        trees = own.arrays, self.arrays, nothing.arrays
        room = max(0, min(nodes, most_guesses(self.max_depth, factor, offset))) + 1
        found, paths = np.empty((3, room), np.int64), np.empty(room, np.float32)
        limits = depth, width, float(factor), float(offset), float(min_probability)
        return Draft(found, paths, *suffix_draft_numba.draft(*trees, last, newest, found, paths, *limits))

    def count(self, pattern: Int[np.ndarray, " n"]) -> int:
        """How often a pattern of 1 to ``max_depth`` tokens occurs."""
        node, _ = self._find(pattern)
        return int(self.arrays.nodes[node, COUNT]) if node != NONE else 0

    def followers(self, pattern: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
        """What followed a pattern, and how often; most often first.

        Of equal counts the last to recur comes first, of those seen once the first.
        """
        nodes, tokens = self.arrays.nodes, self.arrays.tokens
        node, inside = self._find(pattern)
        if node == NONE and len(pattern):
            return []
        if inside < nodes[node, LENGTH]:
            found = [(int(tokens[nodes[node, START] + inside]), int(nodes[node, COUNT]))]
        else:
            found, child = [], nodes[node, HEAD]
            while child != NONE:
                found.append((int(nodes[child, TOKEN]), int(nodes[child, COUNT])))
                child = nodes[child, NEXT]
        return [each for each in found if each[0] != END]

    @property
    def growing(self) -> int:
        """How many tokens the newest sequence has been given, 0 once it has ended."""
        return int(self.block[GROWING])

    @property
    def tokens(self) -> Int[np.ndarray, " length"]:
        """A copy of all sequences that are not forgotten, oldest first, -1 behind each that has ended."""
        return self.arrays.tokens[self.block[OLDEST] : self.block[SIZE]].copy()

    @property
    def arrays(self) -> Arrays:
        """The parts of the block; views, until it grows."""
        return cast(Arrays, suffix_tree_numba.unpack(self.block))

    @property
    def bytes_used(self) -> int:
        """Bytes held, free or not."""
        return self.block.nbytes

    def _find(self, pattern: Int[np.ndarray, " n"]) -> tuple[int, int]:
        arrays = self.arrays
        return cast(tuple[int, int], suffix_tree_numba.find(arrays.nodes, arrays.table, arrays.tokens, pattern))

    def _grow(self, new: int) -> bool:
        """Make what is full larger by a quarter, or enough for ``new`` tokens, or as memory allows; whether it does.

        What is nearly full grows with it, for all is moved. Where much was forgotten, moving makes room enough.
        """
        rooms, need = self.block[[[NODE_ROOM, RUN_ROOM, TOKEN_ROOM], [LIVE, RUNS, SIZE]]].astype(np.int64)
        need += 2 * self.max_depth + 2  # a token may take so many runs
        need[2] -= self.block[OLDEST]
        if self._max_bytes is None:
            need += new, new // 2, new
        for part in (4, 8, 16):
            larger = np.maximum(rooms + rooms // part, need)
            more = np.where(need > rooms - rooms // 8, larger, rooms).tolist()
            if self._max_bytes is None or 4 * suffix_tree_numba.size(self.max_depth, *more) <= self._max_bytes:
                block = self._empty(*more)
                suffix_tree_numba.move(self.block, block)
                self.block = block
                return True
        return False

    def _empty(self, nodes: int, runs: int, tokens: int) -> Int[np.ndarray, " size"]:
        if max(nodes, tokens) > LARGEST:
            raise MemoryError("a suffix tree has 2**31 nodes at most: set max_bytes")
        block = np.zeros(suffix_tree_numba.size(self.max_depth, nodes, runs, tokens), np.int32)
        block[[MAX_DEPTH, NODE_ROOM, RUN_ROOM, TOKEN_ROOM]] = self.max_depth, nodes, runs, tokens
        return block
