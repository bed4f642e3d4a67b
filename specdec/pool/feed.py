"""A streamer that hands what is written to a queue, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

END = object()  # after the last piece


class TokenFeed(BaseStreamer):  # type: ignore[misc]
    """Hands on token ids, the prompt's left out."""

    def __init__(self, put: Callable[[int], Any]) -> None:
        self._put = put
        self._prompt_has_come = False

    def put(self, value: torch.Tensor) -> None:
        """Take what was committed."""
        for token in value.flatten().tolist() if self._prompt_has_come else []:
            self._put(token)
        self._prompt_has_come = True

    def end(self) -> None:
        """Nothing is held back."""


class TextFeed(TextStreamer):  # type: ignore[misc]
    """Hands on text as soon as later tokens cannot change it, the prompt's left out."""

    def __init__(self, tokenizer: Any, put: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        if text:
            self._put(text)


def feed(tokenizer: Any, put: Callable[[Any], Any]) -> BaseStreamer:
    """A streamer that hands each piece to ``put``: text, or token ids where there is no tokenizer."""
    return TokenFeed(put) if tokenizer is None else TextFeed(tokenizer, put)
