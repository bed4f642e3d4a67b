"""Recorded conversations as token ids: what was asked, and what was answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError

from specdec.trace import read_trace

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One recorded answer.

    Attributes:
        session: the conversation it belongs to.
        prompt: what a model would have been given, all earlier turns included; at least one token.
        tokens: the answer, without a token that ends it; at least one token.
        namespace: whose memory drafters use for it.
        where: file and line, for messages.
    """

    session: str
    prompt: Int[np.ndarray, " prompt"]
    tokens: Int[np.ndarray, " response"]
    namespace: str
    where: str


def read(path: Path, tokenizer: Any, namespace: str | None = None) -> Iterator[Response]:
    """The responses of a JSONL file, in order.

    Each line is a row ``{"session", "prompt", "response"}``, of text or of token ids, or a chat transcript
    ``{"session", "messages"}``, in which each assistant message answers all that stands before it, or a question
    ``{"id", "messages", "reference"}`` with its one answer. A line without ``session`` and ``id`` is a session of its
    own. Answers without text are passed over. A file that ``wrap(trace=...)`` recorded has the answers of all its
    generations; a session is what goes by one label.

    Args:
        tokenizer: of Hugging Face; its chat template renders transcripts, whose contents are simply joined where it
            has none. None where all lines hold token ids.
        namespace: of the responses; by default the path.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line holds no recorded answer; the message names file and line.
    """
    namespace = str(path) if namespace is None else namespace
    if _is_recording(path):
        yield from _recorded(path, namespace)
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _responses(line, tokenizer, namespace, f"{path}, line {number}")


def _is_recording(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    return first.startswith(b"{") and b'"trace"' in first and _type(first) == "trace"


def _type(line: bytes) -> Any:
    try:
        return json.loads(line).get("type")
    except ValueError:
        return None


def _recorded(path: Path, namespace: str) -> Iterator[Response]:
    """The answers of a trace; those whose prompt or answer has no tokens are passed over."""
    for generation in read_trace(path).generations:
        for row, prompt in enumerate(generation.prompts):
            where, answer = f"{path}, generation {generation.id}, row {row}", generation.output(row)
            if prompt and answer:
                ids = np.array(prompt, np.int64), np.array(answer, np.int64)
                yield Response(generation.label or where, *ids, namespace, where)


def _responses(line: str, tokenizer: Any, namespace: str, where: str) -> list[Response]:
    try:
        entry = json.loads(line)
        session = str(entry.get("session", entry.get("id", where)))
        said = [(_prompt(tokenizer, asked), _ids(tokenizer, answer)) for asked, answer in _answers(entry)]
        if any(len(prompt) == 0 for prompt, _ in said):
            raise ValueError("the prompt is empty")
    except (ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        raise ValueError(f"{where}: no recorded answer: {_reason(error)}") from error
    return [Response(session, prompt, tokens, namespace, where) for prompt, tokens in said if len(tokens)]


def _answers(entry: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Pairs of what was asked (text, token ids, or messages) and what was answered (text or token ids)."""
    if "messages" not in entry:
        return [(entry["prompt"], entry["response"])]
    messages = [{"role": message["role"], "content": _text(message["content"])} for message in entry["messages"]]
    if "reference" in entry:
        return [(messages, entry["reference"])]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise ValueError("no assistant message after another, and no reference")
    return [(messages[:i], messages[i]["content"]) for i in answers]


def _prompt(tokenizer: Any, asked: Any) -> Int[np.ndarray, " prompt"]:
    if not (isinstance(asked, list) and asked and isinstance(asked[0], dict)):
        return _ids(tokenizer, asked, special=True)
    if not getattr(tokenizer, "chat_template", None):
        return _ids(tokenizer, "".join(message["content"] for message in asked), special=True)
    return _ids(tokenizer, tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))


def _ids(tokenizer: Any, said: Any, special: bool = False) -> Int[np.ndarray, " length"]:
    """Token ids of a text, with the ``special`` ones that open a prompt; or ids that were given."""
    if isinstance(said, list):
        if not all(type(token) is int and token >= 0 for token in said):
            raise ValueError("token ids must be whole numbers from 0")
        return np.array(said, np.int64)
    if tokenizer is None:
        raise ValueError("it holds text, which needs a tokenizer")
    encoded = tokenizer(_text(said), add_special_tokens=special, verbose=False)
    return np.array(encoded["input_ids"], np.int64)


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError(f"a text was due where a {type(content).__name__} stands")
    return content


def _reason(error: Exception) -> str:
    return f"it has no {error}; see docs/replay.md" if isinstance(error, KeyError) else str(error)
