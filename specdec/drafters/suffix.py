"""SuffixDecoding: what followed before, in this text and in past responses, follows again."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakSet, ref

import numpy as np
from jaxtyping import Float, Int

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.drafters import suffix_draft_numba, suffix_file
from specdec.drafters.generations import Generations
from specdec.drafters.namespaces import Namespaces
from specdec.drafters.suffix_tree import NO_DRAFT, Draft, SuffixTree, most_guesses

_NOTHING = Budget(nodes=0, depth=0, width=0)
KEPT = 4  # finished texts of a namespace that a conversation may go on with, an eighth of its memory at most


class SuffixDrafter:
    """Continues the last tokens as earlier occurrences of them were continued, in proportion to how often.

    Suffix trees with counts are asked: one of the context's own prompt and output, and of past responses of the same
    namespace, this one among them as it grows. A context's own tree dies with it, unless the next prompt goes on
    where one of the last finished contexts ended: it takes over that tree. Every length of match is tried. The longer
    the match, the more is drafted: at most ``factor * match + offset`` tokens, no path less likely than
    ``min_probability`` by the counts. The draft with the largest sum of probabilities wins, of equals the longer match,
    and the context's own; of equally frequent tokens, the last to recur. If it falls short of ``threshold`` and there
    is a ``fallback``, that one drafts instead.

    The trees' own estimates decide what is drafted. The probabilities handed on are corrected by how often guesses of
    their kind came true, which is learnt on line.

    It needs nothing of the target and its guesses are chosen, not sampled. A token of either tree takes about 100
    bytes; the oldest half of the past responses is forgotten where ``max_bytes`` would be exceeded. Threads may share a
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
        max_bytes: int = 64 << 20,
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
        if max_sequences is not None and max_sequences < 0:
            raise ValueError(f"need max_sequences >= 0, got max_sequences={max_sequences}")
        Generations(max_depth, max_bytes)  # whose complaints are wanted now
        self.max_depth, self.max_bytes, self.max_sequences = max_depth, max_bytes, max_sequences
        self.factor, self.offset, self.min_probability, self.mode = factor, offset, min_probability, mode
        self._most = most_guesses(max_depth, factor, offset)
        self.fallback, self.threshold = fallback, threshold
        self.topk = 0 if fallback is None else fallback.topk
        self.hidden = fallback is not None and fallback.hidden
        self.ahead = fallback is None or bool(getattr(fallback, "ahead", False))
        self._memories = Namespaces(lambda: Memory(max_depth, max_bytes, max_sequences), namespaces)
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
        self._memories[namespace].learn(response)

    def reset(self, namespace: str | None = None) -> None:
        """Forget one namespace, or everything that was learnt; texts still being written keep their own trees."""
        self._memories.forget(namespace)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was learnt to ``path``, which changes at once or, on OSError, not at all."""
        suffix_file.write(path, {name: memory.content() for name, memory in self._memories.items().items()})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace everything that was learnt by what ``save`` wrote; on an error nothing changes.

        The trees are built anew, with this drafter's ``max_depth`` and limits, at about a microsecond per token.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was not written by ``save``, or it is damaged.
        """
        memories = dict[str, Memory]()
        for namespace, (tokens, accepted, offered) in suffix_file.read(path).items():
            memory = memories[namespace] = self._memories.make()
            memory.acceptance.accepted[:], memory.acceptance.offered[:] = accepted, offered
            for response in np.split(tokens, np.flatnonzero(tokens < 0)):
                memory.learn(response[response >= 0])
        self._memories.replace(memories)

    @property
    def bytes_used(self) -> int:
        """Bytes held for all namespaces and for all living contexts."""
        with self._lock:
            own = sum(text.bytes_used for text in self._texts)
        return own + self._memories.bytes_used

    def _draft(self, context: Context, budget: Budget) -> tuple[DraftTree, float]:
        """One tree and its score."""
        memory = self._memories[context.namespace]
        text = context.scratch.get(self) or self._text(context, memory)
        allowed = not context.finished and min(budget.nodes, budget.depth, budget.width) > 0
        width = 1 if self.mode == "path" else budget.width
        nodes = min(budget.nodes, self._most) if allowed else 0
        limits = nodes, budget.depth, width, self.factor, self.offset, self.min_probability
        found, paths, n, score, _ = memory.draft(text, context, limits)
        if context.finished:
            del context.scratch[self]
        tokens, parents, probability = found[0, :n], found[1, :n], paths[:n]
        if budget.least > 0 and probability.min() < budget.least:
            kept = trees.prune(parents, probability, n, n, n, budget.least)
            tokens, parents, probability = trees.select(tokens, parents, probability, kept)
        return DraftTree(tokens, parents, probability, (self.name,) * len(tokens)), score

    def _text(self, context: Context, memory: Memory) -> Text:
        """A new context's own tree, an earlier one's if that was its beginning; the prompt is entered unlocked."""
        tokens = context.tokens
        text = context.scratch[self] = memory.resume(tokens) or Text(self.max_depth)
        text.tree.extend(tokens[text.tree.growing :])
        with self._lock:
            self._texts.add(text)
        return text


class Text:
    """One sequence's own tree, what was guessed last, and how much of the response is in the memory."""

    def __init__(self, max_depth: int):
        self.tree = SuffixTree(max_depth)
        self.guess = NO_DRAFT
        self.remembered = 0

    def begins(self, tokens: Int[np.ndarray, " length"]) -> bool:
        """Whether these tokens begin with the text."""
        n, own = self.tree.growing, self.tree.arrays.tokens
        return n <= len(tokens) and bool(tokens[n - 1] == own[n - 1]) and np.array_equal(tokens[:n], own[:n])

    @property
    def bytes_used(self) -> int:
        return self.tree.bytes_used


class Memory:
    """A namespace's past responses, and how often guesses came true there. Its lock is held while the tree is used.

    One text at a time is entered as it is written, the others when they are finished, for a tree grows at one end.
    The trees of the last finished texts are kept, for the next prompt of a conversation begins with all of the last.
    """

    def __init__(self, max_depth: int, max_bytes: int, max_sequences: int | None):
        self.acceptance = Acceptance(prior(), weight=4.0)
        self._most_kept = max_bytes // 8
        self._tree = Generations(max_depth, max(max_bytes - self._most_kept, 1024 * max_depth))
        self._max_sequences = max_sequences
        self._kept: deque[Text] = deque(maxlen=KEPT)
        self._writer: Callable[[], Text | None] = lambda: None
        self._lock = threading.Lock()

    def draft(self, text: Text, context: Context, limits: tuple[int, int, int, float, float, float]) -> Draft:
        """The better of the drafts of a text's own tree and of this memory, after what is new was entered in both.

        What became of the last guess is counted, once.
        """
        tokens = context.tokens
        with self._lock:
            writes = self._writer() is text or self._claim(text, context.finished)
            said = len(tokens) - context.prompt_length - text.remembered if writes else 0
            guess = self._tree.advance(text.tree, self.acceptance, text.guess, tokens, said, writes, limits)
            text.guess = guess
            text.remembered += said
            if context.finished:
                self._end()
                self._keep(text)
        return guess

    def resume(self, tokens: Int[np.ndarray, " length"]) -> Text | None:
        """A finished text that these tokens begin with, if one is kept; from now on it is the caller's."""
        with self._lock:
            found = next((text for text in reversed(self._kept) if text.begins(tokens)), None)
            if found is not None:
                self._kept.remove(found)
        return found

    def learn(self, response: Int[np.ndarray, " length"]) -> None:
        """Enter a whole response."""
        with self._lock:
            self._tree.end()
            self._tree.extend(response)
            self._end()

    def _claim(self, text: Text, finished: bool) -> bool:
        """Make a response the one that is entered, if it is finished or no other is being entered."""
        if self._writer() is not None and not finished:
            return False
        self._tree.end()
        self._writer = ref(text)
        return True

    def _end(self) -> None:
        self._tree.end()
        self._writer = lambda: None
        while self._max_sequences is not None and self._tree.sequences > self._max_sequences:
            self._tree.forget()

    def _keep(self, text: Text) -> None:
        text.guess, text.remembered = NO_DRAFT, 0
        self._kept.append(text)
        while sum(each.bytes_used for each in self._kept) > self._most_kept:
            self._kept.popleft()

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
