"""What was written in past texts and conversations, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def responses(text: Any, tokenizer: Any = None) -> Iterator[Sequence[int]]:
    """The parts of a text, of token ids, or of a conversation that a model is to write again.

    Of a conversation: what the chat template makes of each of the assistant's messages, tool calls included.

    Raises:
        ValueError: no tokenizer where one is needed, or neither text, ids nor messages.
    """
    if isinstance(text, str) or _is_conversation(text):
        if tokenizer is None:
            raise ValueError("texts and conversations need a tokenizer: warm(texts, tokenizer)")
        written = [text] if isinstance(text, str) else _written(text, tokenizer)
        yield from (tokenizer.encode(each, add_special_tokens=False) for each in written)
        return
    ids = np.asarray(text)
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind not in "iu" or ids.min() < 0)):
        raise ValueError(f"give texts, rows of token ids, or lists of messages, got {text!r:.80}")
    yield ids.tolist()


def _is_conversation(text: Any) -> bool:
    return isinstance(text, Sequence) and len(text) > 0 and all(isinstance(message, Mapping) for message in text)


def _written(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> Iterator[str]:
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(tokenizer, messages[:i], add_generation_prompt=True)
            after = _rendered(tokenizer, messages[: i + 1])
            # A template that rewrites earlier messages leaves no common beginning.
            yield after.removeprefix(before) if after.startswith(before) else str(message.get("content") or "")


def _rendered(tokenizer: Any, messages: Sequence[Any], **options: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return text
