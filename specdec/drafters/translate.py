"""Drafting across tokenizers: through the text that both spell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from specdec.core import Context
from specdec.spelling import INCOMPLETE

TAIL = 32  # last tokens that are spelled anew at every step, since what follows may change how they are divided
BEFORE = 8  # tokens that a guess is joined to, since that may change how it is divided


@dataclass(slots=True)
class Spelled:
    """What of a text need not be spelled again: ``done`` tokens of the target, as ``ids`` of the drafter."""

    done: int = 0
    ids: list[int] = field(default_factory=list)


class Translation:
    """Turns a target's tokens into a drafter's, and a drafter's guesses into the target's.

    A guess that the target's tokenizer does not spell back to the same text is dropped. The work of a step does not
    grow with the text.

    Args:
        own: the drafter's tokenizer.
        target: the target's.
    """

    def __init__(self, own: Any, target: Any) -> None:
        self.own, self.target = own, target
        first = own.encode("a")[:1]
        self.opening = first if first == [own.bos_token_id] else []

    def inward(self, context: Context) -> Int[np.ndarray, " length"]:
        """The text as the drafter's tokens; its state is kept in the context's scratch."""
        spelled: Spelled = context.scratch.setdefault(self, Spelled(ids=list(self.opening)))
        tokens = context.tokens
        while len(tokens) - spelled.done > 2 * TAIL:
            end = self._boundary(tokens, spelled.done)
            spelled.ids += self._spell(tokens, spelled.done, end)
            spelled.done = end
        return np.array(spelled.ids + self._spell(tokens, spelled.done, len(tokens)), np.int64)

    def outward(self, context: Context, own: Sequence[int], guesses: Sequence[int]) -> list[int]:
        """The drafter's ``guesses``, which follow its tokens ``own``, as the target's; none if they do not survive."""
        before = list(own[-BEFORE:])
        said = _text(self.own, [*before, *guesses]).removeprefix(_text(self.own, before)).split(INCOMPLETE)[0]
        tail = context.tokens[-BEFORE:].tolist()
        text = _text(self.target, tail)
        whole = _ids(self.target, text + said)
        joined = whole[: len(tail)] == tail
        found = whole[len(tail) :] if joined else _ids(self.target, said)
        return found if _text(self.target, [*tail, *found]) == text + said else []

    def _boundary(self, tokens: Int[np.ndarray, " length"], start: int) -> int:
        """Where a word begins after ``TAIL`` tokens or a few fewer; after as many where none does."""
        for end in range(start + TAIL, start + TAIL // 2, -1):
            if self._piece(tokens, end, end + 1)[:1].isspace():
                return end
        return start + TAIL

    def _spell(self, tokens: Int[np.ndarray, " length"], start: int, end: int) -> list[int]:
        return _ids(self.own, self._piece(tokens, start, end))

    def _piece(self, tokens: Int[np.ndarray, " length"], start: int, end: int) -> str:
        """What some tokens say within the text: decoded first, they would lose a space before them."""
        before = tokens[max(0, start - 1) : start].tolist()
        both = _text(self.target, [*before, *tokens[start:end].tolist()])
        return both.removeprefix(_text(self.target, before))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
