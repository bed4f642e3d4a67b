"""How often everything up to a certain length occurred in some sequences: a suffix tree with counts."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float32, Int

from specdec.calibration import Acceptance
from specdec.drafters import suffix_draft_numba, suffix_tree_numba
from specdec.drafters.suffix_tree_numba import (
    COLUMNS,
    COUNT,
    END,
    GROWING,
    HEAD,
    LENGTH,
    LIVE,
    MATCHED,
    NEXT,
    NODES,
    NONE,
    OLDEST,
    ROOT,
    RUNS,
    SIZE,
    START,
    TOKEN,
    Arrays,
)

LARGEST = 2**31 - 2  # a store's positions and a tree's nodes are int32
NODE_BYTES = 4 * (COLUMNS + 2 + 2)  # a node's columns, a run and two slots of the table
STEP = 4096  # tokens forgotten at once at most, so that no call waits long


class Draft(NamedTuple):
    """A drafted tree; arrays by node, the root first.

    Attributes:
        probability: how often each path was seen, of the times its match was; or what that is corrected to.
        kinds: what tells how sure a guess is, as ``suffix_draft_numba`` numbers it.
        score: the sum of the guesses' probabilities.
        match: how many of the context's last tokens were looked up for it.
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    probability: Float32[np.ndarray, " nodes"]
    kinds: Int[np.ndarray, " nodes"]
    score: float
    match: int


class SuffixTree:
    """The counts of all n-grams of some sequences, up to ``max_depth`` tokens, in time and memory linear in the tokens.

    Sequences are appended one after the other, the newest token by token. Where ``max_bytes`` would be exceeded, the
    oldest tokens are forgotten, exactly: all counts are then as if the sequences had begun later. A token takes about
    50 to 150 bytes. Not safe to be used by several threads at once.

    Args:
        max_depth: longest n-gram.
        max_bytes: memory to use at most, None for any.

    Attributes:
        sequences: how many ended sequences are in the tree, a partly forgotten one among them.

    Raises:
        ValueError: max_depth below 2, or less than 1024 bytes per level.
    """

    def __init__(self, max_depth: int = 64, max_bytes: int | None = None):
        if max_depth < 2:
            raise ValueError(f"max_depth must be at least 2, a token of match and one of guess, got {max_depth}")
        if max_bytes is not None and max_bytes < 1024 * max_depth:
            raise ValueError(f"max_bytes must be at least 1024 * max_depth = {1024 * max_depth}, got {max_bytes}")
        self.max_depth, self.sequences = max_depth, 0
        # Text that repeats itself has more tokens than nodes, hence an eighth for the tokens.
        self._most_tokens = LARGEST if max_bytes is None else max_bytes // 8 // 4
        self._most_nodes = LARGEST if max_bytes is None else (max_bytes - max_bytes // 8) // NODE_BYTES
        nodes = min(4 * max_depth, self._most_nodes)
        self.arrays = Arrays(
            nodes=np.zeros((nodes, COLUMNS), np.int32),
            runs=np.zeros((nodes, 2), np.int32),
            table=np.zeros(2 * nodes, np.int32),
            tokens=np.full(min(4 * max_depth, self._most_tokens), END, np.int32),
            active=np.zeros(max_depth + 1, np.int32),
            state=np.zeros(9, np.int64),
        )
        self.arrays.state[[LIVE, NODES, RUNS]] = 1  # the root, and no run 0

    def extend(self, tokens: Int[np.ndarray, " new"]) -> None:
        """Append tokens, from 0 to 2**31 - 1, to the newest sequence."""
        tokens = tokens.astype(np.int32)  # one type for the kernels
        done = suffix_tree_numba.extend(self.arrays, tokens)
        while done < len(tokens):
            self._make_room(len(tokens) - done)
            done += suffix_tree_numba.extend(self.arrays, tokens[done:])

    def end(self) -> None:
        """End the newest sequence, if it has tokens; the next token begins another."""
        if self.growing:
            self.arrays.state[SIZE] += 1  # what stands there is END
            self.arrays.state[[GROWING, MATCHED]] = 0
            self.sequences += 1

    def forget(self) -> None:
        """Forget the oldest of the ended sequences, if there is one."""
        if self.sequences:
            oldest = self.arrays.state[OLDEST]
            self._forget(oldest + int(np.argmax(self.arrays.tokens[oldest:] == END)) + 1)

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
        own, last = own or SuffixTree(self.max_depth), context[-self.max_depth :].astype(np.int32)
        limits = nodes, depth, width, float(factor), float(offset), float(min_probability)
        return Draft(*suffix_draft_numba.draft(own.arrays, self.arrays, last, newest, *limits))

    def advance(
        self,
        own: SuffixTree,
        acceptance: Acceptance,
        tokens: Int[np.ndarray, " length"],
        said: int,
        newest: bool,
        limits: tuple[int, int, int, float, float, float],
    ) -> Draft:
        """What is new of a text entered in its ``own`` tree, and a draft of both trees, in one call of a kernel.

        Args:
            acceptance: how often guesses of each kind come true, which the draft's probabilities then are.
            tokens: the text; as many of them as the own tree has are not new.
            said: how many of the last tokens to enter here.
            newest: whether the newest sequence here is then the text's end; else ``said`` is 0.
            limits: nodes, depth, width, factor, offset and min_probability, as for ``draft``.
        """
        new = len(tokens) - own.growing
        tail = tokens[-max(new, said, self.max_depth) :].astype(np.int32)
        trees, counts = (tuple(own.arrays), tuple(self.arrays)), (acceptance.accepted, acceptance.offered)
        *drafted, new, said = suffix_draft_numba.advance(*trees, *counts, tail, new, said, newest, *limits)
        if new == said == 0:
            return Draft(*drafted)
        own.extend(tail[len(tail) - new :])  # there was no room
        self.extend(tail[len(tail) - said :])
        return self.advance(own, acceptance, tokens, 0, newest, limits)

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
        return int(self.arrays.state[GROWING])

    @property
    def tokens(self) -> Int[np.ndarray, " length"]:
        """A copy of all sequences that are not forgotten, oldest first, -1 behind each that has ended."""
        state = self.arrays.state
        return self.arrays.tokens[state[OLDEST] : state[SIZE]].copy()

    @property
    def bytes_used(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def _find(self, pattern: Int[np.ndarray, " n"]) -> tuple[int, int]:
        arrays = self.arrays
        return cast(tuple[int, int], suffix_tree_numba.find(arrays.nodes, arrays.table, arrays.tokens, pattern))

    def _forget(self, stop: int) -> None:
        self.sequences -= suffix_tree_numba.forget(self.arrays, stop)

    def _make_room(self, new: int) -> None:
        """Grow what is full by half, or for ``new`` tokens, or forget where it may not grow."""
        nodes, tokens, state = self.arrays.nodes, self.arrays.tokens, self.arrays.state
        if state[LIVE] + self.max_depth + 2 > len(nodes):
            if len(nodes) < self._most_nodes:
                self._grow_nodes(min(max(len(nodes) * 3 // 2, len(nodes) + new), self._most_nodes))
            else:
                self._forget_some()
        if state[SIZE] + 2 > len(tokens):
            if state[OLDEST] < len(tokens) // 4 and len(tokens) < self._most_tokens:
                self._move_tokens(min(max(len(tokens) * 3 // 2, len(tokens) + new), self._most_tokens))
            else:
                while state[OLDEST] < len(tokens) // 4:
                    self._forget_some()
                self._move_tokens(len(tokens))

    def _forget_some(self) -> None:
        """Forget a sixteenth of the tokens, the oldest, but nothing that still grows."""
        oldest, size = self.arrays.state[[OLDEST, SIZE]].tolist()
        self._forget(min(oldest + min(max((size - oldest) // 16, 1), STEP), size - self.max_depth))

    def _grow_nodes(self, capacity: int) -> None:
        if len(self.arrays.nodes) == LARGEST:
            raise MemoryError("a suffix tree has 2**31 nodes at most: set max_bytes")
        table = np.zeros(2 * capacity, np.int32)
        suffix_tree_numba.rehash(self.arrays, table)
        nodes, runs = _longer(self.arrays.nodes, capacity), _longer(self.arrays.runs, capacity)
        self.arrays = self.arrays._replace(nodes=nodes, runs=runs, table=table)

    def _move_tokens(self, capacity: int) -> None:
        """Give the store this capacity, what is in the tree at its beginning."""
        nodes, old, state = self.arrays.nodes, self.arrays.tokens, self.arrays.state
        oldest, size = state[[OLDEST, SIZE]].tolist()
        tokens = np.full(capacity, END, np.int32)
        tokens[: size - oldest] = old[oldest:size]
        nodes[ROOT + 1 : state[NODES], START] -= oldest
        state[[OLDEST, SIZE]] = 0, size - oldest
        self.arrays = self.arrays._replace(tokens=tokens)


def _longer(array: np.ndarray, capacity: int) -> np.ndarray:
    grown = np.zeros((capacity, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
