"""Calls of tools in what a model writes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
import secrets
from typing import Any, NamedTuple

from specdec.server.text import beginning

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """One call: a function's name, and its arguments as JSON in a string."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCalls:
    """Tells text from calls, piece by piece. What is no sound call stays text.

    Args:
        known: whether the model's template writes calls in this form; if not, all is text.
    """

    def __init__(self, known: bool) -> None:
        self._known, self._held = known, ""

    def add(self, piece: str) -> list[str | ToolCall]:
        """Text and calls, in order, as far as they are certain."""
        if not self._known:
            return [piece]
        self._held += piece
        found: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            call = parsed(self._held[start + len(OPEN) : end])
            found += [self._held[:start], call or self._held[start : end + len(CLOSE)]]
            self._held = self._held[end + len(CLOSE) :]
        certain = self._certain()
        found.append(self._held[:certain])
        self._held = self._held[certain:]
        return [each for each in found if each]

    def end(self) -> str:
        """What was held back, since no call came of it."""
        held, self._held = self._held, ""
        return held

    def _certain(self) -> int:
        place = self._held.find(OPEN)
        return place if place >= 0 else len(self._held) - beginning(self._held, [OPEN])


def parsed(text: str) -> ToolCall | None:
    """The call that is written between the marks; None if it is none."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(f"call_{secrets.token_hex(12)}", name, written)


def written_by(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template has calls in this form."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(OPEN in text for text in texts)
