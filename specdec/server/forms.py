"""What an answer looks like: OpenAI's objects for chats and for texts, whole and in chunks."""

from __future__ import annotations

from typing import Any, Protocol

from specdec.server.choice import Piece, Spelt


class Form(Protocol):
    """Both kinds of completions, whole and in chunks."""

    prefix: str
    whole: str
    chunk: str

    def opening(self, i: int) -> dict[str, Any] | None:
        """The first chunk's choice, before anything is written."""
        ...

    def choice(self, i: int, piece: Piece) -> dict[str, Any]:
        """A whole answer."""
        ...

    def delta(self, i: int, piece: Piece) -> dict[str, Any]:
        """A chunk's part of it."""
        ...


class ChatForm:
    """Answers to conversations."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self) -> None:
        self._calls: dict[int, int] = {}

    def opening(self, i: int) -> dict[str, Any] | None:
        """Who speaks."""
        return _chat_choice(i, "delta", {"role": "assistant", "content": ""}, Piece())

    def choice(self, i: int, piece: Piece) -> dict[str, Any]:
        """A whole message."""
        text: str | None = piece.text
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        if piece.calls:
            message["tool_calls"] = [call.as_dict() for call in piece.calls]
            text = text if text and text.strip() else None
        return _chat_choice(i, "message", {**message, "content": text}, piece)

    def delta(self, i: int, piece: Piece) -> dict[str, Any]:
        """What is new; calls come whole, numbered."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        for call in piece.calls:
            number = self._calls[i] = self._calls.get(i, -1) + 1
            delta.setdefault("tool_calls", []).append({"index": number, **call.as_dict()})
        return _chat_choice(i, "delta", delta, piece)


class TextForm:
    """Continuations of texts."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def opening(self, i: int) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def choice(self, i: int, piece: Piece) -> dict[str, Any]:
        """A whole text."""
        likely = _text_logprobs(piece.spelt) if piece.spelt else None
        return {"index": i, "text": piece.text, "logprobs": likely, "finish_reason": piece.finish}

    delta = choice


def _chat_choice(i: int, what: str, message: dict[str, Any], piece: Piece) -> dict[str, Any]:
    likely = {"content": [_chat_logprob(each) for each in piece.spelt], "refusal": None} if piece.spelt else None
    return {"index": i, what: message, "logprobs": likely, "finish_reason": piece.finish}


def _chat_logprob(spelt: Spelt) -> dict[str, Any]:
    best = [{"token": text, "bytes": list(raw), "logprob": value} for text, raw, value in spelt.best]
    return {"token": spelt.text, "bytes": list(spelt.raw), "logprob": spelt.likelihood, "top_logprobs": best}


def _text_logprobs(spelt: list[Spelt]) -> dict[str, Any]:
    return {
        "tokens": [each.text for each in spelt],
        "token_logprobs": [each.likelihood for each in spelt],
        "top_logprobs": [{text: value for text, _, value in reversed(each.best)} for each in spelt],
        "text_offset": [each.offset for each in spelt],
    }
