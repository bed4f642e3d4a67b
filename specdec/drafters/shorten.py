"""A long prompt cut down to what of it bears on a question, in the order in which it stood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from specdec.drafters.rank import Bm25, needed

JOINT = "\n\n"  # between what did not follow one another

Tokens = Int[np.ndarray, " length"]


class Ranker(Protocol):
    """Says which texts bear on a question; ``Bm25`` and ``Embedded`` are two."""

    def scores(self, query: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """One number for each text, higher for those that bear on it more."""
        ...


class Shortener:
    """Keeps a prompt's beginning, its end, and the passages between them that bear most on a question.

    Passages are those of semchunk, which cuts at paragraphs, sentences and words; they stay in their order, each once.
    At least ``budget`` tokens of passages are kept, or a ``share``-th part of a very long prompt if that is more.

    Retrieval as in RAPID (Chen et al. 2025, arXiv 2502.20330).

    Args:
        tokenizer: the target's, of transformers.
        query: the question; or a function that finds it in the prompt's text; None for the prompt's last ``tail``.
        budget: tokens of passages.
        share: of prompts longer than ``share * budget``, one of so many tokens is kept.
        chunk: tokens of a passage at most.
        head, tail: first and last tokens of the prompt, which are kept as they are: its instructions.
        least: score from which on a passage is kept at all.
        ranker: says which passages bear on the question; BM25 if None.

    Raises:
        ImportError: what it needs is not installed.
        ValueError: a negative length, or no room for a passage.
    """

    def __init__(
        self,
        tokenizer: Any,
        query: str | Callable[[str], str] | None = None,
        budget: int = 4096,
        share: int = 32,
        chunk: int = 512,
        head: int = 64,
        tail: int = 256,
        least: float = -math.inf,
        ranker: Ranker | None = None,
    ) -> None:
        if min(budget, share, chunk) < 1 or min(head, tail) < 0 or chunk > budget:
            raise ValueError(
                f"budget={budget}, share={share}, chunk={chunk}, head={head}, tail={tail}: give a budget with room "
                "for a chunk, and no negative lengths"
            )
        needed("semchunk")
        self.tokenizer, self.query, self.least = tokenizer, query, least
        self.budget, self.share, self.chunk, self.head, self.tail = budget, share, chunk, head, tail
        self.ranker = ranker or Bm25()
        self._last: tuple[Tokens, Tokens] | None = None  # several rows of a batch may be copies of one prompt

    def passages(self, length: int) -> int:
        """How many passages of a prompt of so many tokens are kept."""
        return math.ceil(max(length / self.share, min(self.budget, length)) / self.chunk)

    def __call__(self, prompt: Tokens) -> Tokens:
        """The shortened prompt; the prompt itself where it is short."""
        if len(prompt) <= self.head + self.tail + self.passages(len(prompt)) * self.chunk:
            return prompt
        last = self._last
        if last is None or not np.array_equal(last[0], prompt):
            last = self._last = prompt.copy(), self._shortened(prompt)
        return last[1]

    def _shortened(self, prompt: Tokens) -> Tokens:
        end = len(prompt) - self.tail
        texts = self._split(self._text(prompt[self.head : end]))
        scores = self.ranker.scores(self._question(prompt), texts)
        best = np.argsort(-scores, kind="stable")[: self.passages(len(prompt))]
        kept = [texts[i] for i in sorted(best.tolist()) if scores[i] >= self.least]
        middle = self._tokens(JOINT + "".join(text + JOINT for text in kept))
        return np.concatenate([prompt[: self.head], middle, prompt[end:]])

    def _question(self, prompt: Tokens) -> str:
        if isinstance(self.query, str):
            return self.query
        return self._text(prompt[-self.tail :]) if self.query is None else self.query(self._text(prompt))

    def _split(self, text: str) -> list[str]:
        semchunk: Any = import_module("semchunk")
        texts: list[str] = semchunk.chunk(text, self.chunk, lambda part: len(self._tokens(part)), memoize=False)
        return texts

    def _text(self, tokens: Tokens) -> str:
        return str(self.tokenizer.decode(tokens.tolist()))

    def _tokens(self, text: str) -> Tokens:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
