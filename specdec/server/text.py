"""Text from tokens as they come: only what later tokens will not change, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

from specdec.spelling import INCOMPLETE

HELD = 16  # tokens that may be held back for one character, which has four bytes at most


class Spelling:
    """Spells one token after another, special ones left out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # what was spelt last, before which a word begins, and what was not spelt yet
        self._known, self._new = "", 0

    def add(self, token: int) -> str:
        """What the token adds; nothing while a character is incomplete."""
        self._window.append(token)
        self._new += 1
        text = self._decoded()
        if text.endswith(INCOMPLETE) and self._new < HELD:
            return ""
        return self._given(text)

    def end(self) -> str:
        """What was held back."""
        return self._given(self._decoded())

    def _given(self, text: str) -> str:
        piece = text[len(self._known) :]
        if piece:
            self._window, self._new = self._window[-self._new :], 0
            self._known = self._decoded()
        return piece

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Cut:
    """Lets text pass up to the first of some stop strings, and holds back what may be the beginning of one.

    Attributes:
        found: whether there was one; nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.found, self._held = stops, False, ""

    def add(self, piece: str) -> str:
        """What may be shown."""
        text = "" if self.found else self._held + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.found = self.found or bool(places)
        shown = min(places) if places else len(text) - beginning(text, self.stops)
        self._held = "" if places else text[shown:]
        return text[:shown]

    def end(self) -> str:
        """What was held back, since no stop string came of it."""
        held, self._held = self._held, ""
        return held


class Stopping(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation where a stop string has been written; sees every token once, in order."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._spelling, self._cut = Spelling(tokenizer), Cut(stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        """Whether the last token has completed a stop string, for the one row."""
        self._cut.add(self._spelling.add(int(input_ids[0, -1])))
        return torch.full((len(input_ids),), self._cut.found, device=input_ids.device)


def beginning(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the marks."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
