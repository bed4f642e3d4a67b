"""SuffixDecoding: what followed before, in this text and in past responses, follows again."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakSet, ref

import numpy as np
from jaxtyping import Float, Int

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.drafters import suffix_draft_numba, suffix_file
from specdec.drafters.suffix_tree import Draft, SuffixTree

_NOTHING = Budget(nodes=0, depth=0, width=0)


class SuffixDrafter:
    """Continues the last tokens as earlier occurrences of them were continued, in proportion to how often.

    Two suffix trees with counts are asked: one of the context's own prompt and output, which dies with it, and one of
    past responses of the same namespace, this one among them as it grows. Every length of match is tried. The longer
    the match, the more is drafted: at most ``factor * match + offset`` tokens, no path less likely than
    ``min_probability`` by the counts. The draft with the largest sum of probabilities wins, of equals the longer match,
    and the context's own. If it falls short of ``threshold`` and there is a ``fallback``, that one drafts instead.

    The trees' own estimates decide what is drafted. The probabilities handed on are corrected by how often guesses of
    their kind came true, which is learnt on line.

    It needs nothing of the target and its guesses are chosen, not sampled. A token of either tree takes about 100
    bytes; past responses are forgotten, the oldest first, where ``max_bytes`` would be exceeded. Threads may share a
    drafter; a tree is locked for microseconds, or while a response is entered, about a microsecond per token.

    Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications" (arXiv 2411.04975).

    Args:
        max_depth: longest n-gram counted, match and continuation together.
        factor, offset: how many tokens to draft after a match of n: ``factor * n + offset`` at most.
        min_probability: of a path, 0 to 1, below which it is not drafted.
        mode: ``"tree"`` for the likeliest nodes, best first, or ``"path"`` for the likeliest next token at each depth.
        max_bytes: memory for the past responses of each namespace.
        max_sequences: past responses kept of each namespace, None for any number.
        namespaces: how many namespaces are kept; the least recently used is forgotten.
        fallback: who drafts where the score is below ``threshold``.
        threshold: for example, how many tokens a step commits with the fallback alone.

    Raises:
        ValueError: a number that makes no sense, or another mode.
    """

    name = "suffix"

    def __init__(
        self,
        max_depth: int = 64,
        factor: float = 1.0,
        offset: float = 0.0,
        min_probability: float = 0.1,
        mode: Literal["tree", "path"] = "tree",
        max_bytes: int = 256 << 20,
        max_sequences: int | None = None,
        namespaces: int = 16,
        fallback: Drafter | None = None,
        threshold: float = 2.0,
    ):
        if mode not in ("tree", "path"):
            raise ValueError(f'mode must be "tree" or "path", got {mode!r}')
        if not (np.isfinite([factor, offset]).all() and factor >= 0 and 0 <= min_probability <= 1):
            raise ValueError(
                "need a finite factor of at least 0, a finite offset, and min_probability from 0 to 1, got "
                f"factor={factor}, offset={offset}, min_probability={min_probability}"
            )
        if namespaces < 1 or (max_sequences is not None and max_sequences < 0):
            raise ValueError(
                f"need namespaces >= 1, max_sequences >= 0, got namespaces={namespaces}, max_sequences={max_sequences}"
            )
        SuffixTree(max_depth, max_bytes)  # whose complaints are wanted now
        self.max_depth, self.max_bytes, self.max_sequences = max_depth, max_bytes, max_sequences
        self.factor, self.offset, self.min_probability, self.mode = factor, offset, min_probability, mode
        self.fallback, self.threshold = fallback, threshold
        self.topk = 0 if fallback is None else fallback.topk
        self.hidden = fallback is not None and fallback.hidden
        self._most_namespaces = namespaces
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._texts: WeakSet[Text] = WeakSet()
        self._lock = threading.Lock()

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where nothing matches."""
        drafted = [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]
        own = [tree for tree, _ in drafted]
        if self.fallback is None:
            return own
        surer = [score >= self.threshold for _, score in drafted]
        left = [_NOTHING if sure else budget for sure, budget in zip(surer, budgets, strict=True)]
        others = self.fallback.draft(contexts, left)
        return [a if sure or len(b) == 1 else b for sure, a, b in zip(surer, own, others, strict=True)]

    def learn(self, tokens: Sequence[int] | Int[np.ndarray, " length"], namespace: str = "") -> None:
        """Remember a past response.

        Raises:
            ValueError: not a list of token ids.
        """
        response = np.asarray(tokens)
        if response.ndim != 1 or (len(response) and response.dtype.kind not in "iu"):
            raise ValueError(f"a response is a list of token ids, got {response.dtype} of shape {response.shape}")
        if len(response) and not 0 <= response.min() <= response.max() < 2**31:
            raise ValueError(f"token ids are from 0 to 2**31 - 1, got {response.min()} to {response.max()}")
        self._memory(namespace).learn(response)

    def reset(self, namespace: str | None = None) -> None:
        """Forget one namespace, or everything that was learnt; texts still being written keep their own trees."""
        with self._lock:
            if namespace is None:
                self._memories.clear()
            else:
                self._memories.pop(namespace, None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was learnt to ``path``, which changes at once or, on OSError, not at all."""
        with self._lock:
            memories = dict(self._memories)
        suffix_file.write(path, {namespace: memory.content() for namespace, memory in memories.items()})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace everything that was learnt by what ``save`` wrote; on an error nothing changes.

        The trees are built anew, with this drafter's ``max_depth`` and limits, at about a microsecond per token.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was not written by ``save``, or it is damaged.
        """
        memories: OrderedDict[str, Memory] = OrderedDict()
        for namespace, (tokens, accepted, offered) in suffix_file.read(path).items():
            memory = memories[namespace] = self._empty()
            memory.acceptance.accepted[:], memory.acceptance.offered[:] = accepted, offered
            for response in np.split(tokens, np.flatnonzero(tokens < 0)):
                memory.learn(response[response >= 0])
        with self._lock:
            self._memories = memories
            self._forget_oldest()

    @property
    def bytes_used(self) -> int:
        """Bytes held for all namespaces and for all living contexts."""
        with self._lock:
            held: list[Memory | Text] = [*self._memories.values(), *self._texts]
        return sum(each.bytes_used for each in held)

    def _draft(self, context: Context, budget: Budget) -> tuple[DraftTree, float]:
        """One tree and its score."""
        tokens, text, memory = context.tokens, self._text(context), self._memory(context.namespace)
        text.catch_up(tokens, memory.acceptance)
        memory.follow(text, tokens[context.prompt_length :], context.finished)
        if context.finished:
            del context.scratch[self]
        if context.finished or min(budget.nodes, budget.depth, budget.width) <= 0:
            return DraftTree.root(int(tokens[-1])), 0.0
        width = 1 if self.mode == "path" else budget.width
        limits = budget.nodes, budget.depth, width, self.factor, self.offset, self.min_probability
        guess = text.guess = memory.draft(text, tokens, limits)
        return self._within(budget.least, guess, memory.acceptance), guess.score

    def _within(self, least: float, guess: Draft, acceptance: Acceptance) -> DraftTree:
        n = len(guess.tokens)
        probability = acceptance.paths(guess.parents, guess.kinds)
        tree = DraftTree(guess.tokens, guess.parents, probability, (self.name,) * n)
        return tree.take(trees.prune(guess.parents, probability, n, n, n, least)) if probability.min() < least else tree

    def _text(self, context: Context) -> Text:
        text: Text | None = context.scratch.get(self)
        if text is None:
            text = context.scratch[self] = Text(self.max_depth)
            with self._lock:
                self._texts.add(text)
        return text

    def _memory(self, namespace: str) -> Memory:
        with self._lock:
            memory = self._memories.get(namespace)
            if memory is None:
                memory = self._memories[namespace] = self._empty()
                self._forget_oldest()
            self._memories.move_to_end(namespace)
            return memory

    def _empty(self) -> Memory:
        return Memory(SuffixTree(self.max_depth, self.max_bytes), self.max_sequences)

    def _forget_oldest(self) -> None:
        while len(self._memories) > self._most_namespaces:
            self._memories.popitem(last=False)


class Text:
    """One sequence's own tree, what was guessed last, and how much of the response is in the memory."""

    def __init__(self, max_depth: int):
        self.tree = SuffixTree(max_depth)
        self.guess: Draft | None = None
        self.remembered = 0
        self._length = 0

    def catch_up(self, tokens: Int[np.ndarray, " length"], acceptance: Acceptance) -> None:
        """Enter what was committed since, and count what became of the last guess, once."""
        new, self._length = tokens[self._length :], len(tokens)
        if self.guess is not None:
            acceptance.learn(self.guess.tokens, self.guess.parents, self.guess.kinds, new)
            self.guess = None
        self.tree.extend(new)

    @property
    def bytes_used(self) -> int:
        return self.tree.bytes_used


class Memory:
    """A namespace's past responses, and how often guesses came true there. Its lock is held while the tree is used.

    One text at a time is entered as it is written, the others when they are finished, for a tree grows at one end.
    """

    def __init__(self, tree: SuffixTree, max_sequences: int | None):
        self.acceptance = Acceptance(prior(), weight=4.0)
        self._tree, self._max_sequences = tree, max_sequences
        self._writer: Callable[[], Text | None] = lambda: None
        self._lock = threading.Lock()

    def follow(self, text: Text, response: Int[np.ndarray, " length"], finished: bool) -> None:
        """Enter what is new in a response, if it is finished or no other is being entered."""
        with self._lock:
            writer = self._writer()
            if writer is not text:
                if writer is not None and not finished:
                    return
                self._tree.end()
                self._writer = ref(text)
            self._tree.extend(response[text.remembered :])
            text.remembered = len(response)
            if finished:
                self._end()

    def learn(self, response: Int[np.ndarray, " length"]) -> None:
        """Enter a whole response."""
        with self._lock:
            self._tree.end()
            self._tree.extend(response)
            self._end()

    def _end(self) -> None:
        self._tree.end()
        self._writer = lambda: None
        while self._max_sequences is not None and self._tree.sequences > self._max_sequences:
            self._tree.forget()

    def draft(
        self, text: Text, tokens: Int[np.ndarray, " length"], limits: tuple[int, int, int, float, float, float]
    ) -> Draft:
        """The better of the drafts of a text's own tree and of this memory."""
        with self._lock:
            newest = self._tree.growing if self._writer() is text else 0
            return self._tree.draft(tokens, *limits, own=text.tree, newest=newest)

    def content(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of the responses, -1 behind each, and of the counts of accepted and offered guesses by kind."""
        with self._lock:
            return self._tree.tokens, self.acceptance.accepted.copy(), self.acceptance.offered.copy()

    @property
    def bytes_used(self) -> int:
        return self._tree.bytes_used + self.acceptance.bytes_used


def prior() -> Float[np.ndarray, " kinds"]:
    """How likely a guess of each kind, as the kernels number them, is before anything is learnt.

    Its share of what was seen, less an escape that each doubling of the match divides by 2.5.
    """
    _, match, count, share = np.indices(suffix_draft_numba.SHAPE).reshape(4, -1)
    seen, shares = np.array([1.0, 2.5, 5.0, 12.0])[count], np.array([0.2, 0.5, 0.8, 1.0])[share]
    rate: np.ndarray = shares * seen / (seen + 2.3 / 2.5 ** (match - 1))
    return rate
