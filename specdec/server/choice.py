"""One of the answers to a request, as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from specdec.server.likelihoods import Likelihood
from specdec.server.text import Cut, Spelling
from specdec.server.tools import ToolCall, ToolCalls
from specdec.spelling import spell

Finish = Literal["stop", "length", "tool_calls"]


class Token(NamedTuple):
    """A committed token, with what the model thought of it where that was asked for."""

    id: int
    likelihood: Likelihood | None = None


class Spelt(NamedTuple):
    """A token's text and bytes, its log probability, the likeliest tokens' in its place, and where its text begins."""

    text: str
    raw: bytes
    likelihood: float
    best: list[tuple[str, bytes, float]]
    offset: int


@dataclass
class Piece:
    """What has become certain of an answer: text and calls in order, its tokens, and at the end why it ended."""

    parts: list[str | ToolCall] = field(default_factory=list)
    spelt: list[Spelt] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[ToolCall]:
        """The calls alone."""
        return [part for part in self.parts if isinstance(part, ToolCall)]

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.parts + other.parts, self.spelt + other.spelt, other.finish or self.finish)

    def __bool__(self) -> bool:
        return bool(self.parts or self.spelt or self.finish)


class Choice:
    """Makes pieces of tokens.

    Args:
        tokenizer: spells.
        stops: strings that end the text and are not shown.
        ends: tokens that end the text.
        calls: whether to look for calls of tools.

    Attributes:
        tokens: how many were written, one that ends the text among them.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], ends: Collection[int], calls: bool) -> None:
        self.tokens, self._tokenizer, self._ends = 0, tokenizer, ends
        self._spelling, self._cut, self._calls = Spelling(tokenizer), Cut(stops), ToolCalls(calls)
        self._finish: Finish = "length"
        self._called = False
        self._written = self._shown = 0  # characters
        self._noted = deque[Spelt]()

    def add(self, token: Token) -> Piece:
        """What has become certain with a token."""
        self.tokens += 1
        if token.id in self._ends:
            self._finish = "stop"
            return Piece()
        if token.likelihood is not None:
            self._noted.append(self._spelt(token.id, token.likelihood))
        written = self._spelling.add(token.id)
        self._written += len(written)
        return self._piece(self._cut.add(written))

    def end(self) -> Piece:
        """The rest, and why there is no more."""
        piece = self._piece(self._cut.add(self._spelling.end()) + self._cut.end(), last=True)
        rest = self._calls.end()
        piece.parts += [rest] if rest else []
        piece.finish = "tool_calls" if self._called and self._finish == "stop" else self._finish
        return piece

    def _piece(self, shown: str, last: bool = False) -> Piece:
        self._shown += len(shown)
        parts = self._calls.add(shown) if shown else []
        if self._cut.found:
            self._finish = "stop"
        self._called = self._called or any(isinstance(part, ToolCall) for part in parts)
        count = sum(each.offset < self._shown or (last and not self._cut.found) for each in self._noted)
        return Piece(parts, [self._noted.popleft() for _ in range(count)])

    def _spelt(self, id: int, likelihood: Likelihood) -> Spelt:
        texts, parts = spell(self._tokenizer, {id, *(other for other, _ in likelihood.best)})
        said = {each: (text, parts.get(each) or text.encode(errors="replace")) for each, text in texts.items()}
        best = [(*said[other], value) for other, value in likelihood.best]
        return Spelt(*said[id], likelihood.token, best, self._written)
