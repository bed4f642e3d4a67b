"""Text as it is written: the pieces of one generation, from a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from transformers import TextStreamer

from specdec import openmp


class Abandoned(Exception):  # noqa: N818
    """Nobody reads on; raised inside the generation to end it."""


class Pieces(TextStreamer):  # type: ignore[misc]
    """A streamer that queues text, the prompt left out, and ends a generation that nobody reads."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = SimpleQueue[str | None]()
        self.abandoned = False
        self.error: BaseException | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take what was committed. Raises Abandoned."""
        if self.abandoned:
            raise Abandoned
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        if text:
            self.queue.put(text)

    def run(self, generation: Callable[[Pieces], Any]) -> None:
        """Run a generation to its end and remember what it raised."""
        try:
            generation(self)
        except BaseException as error:  # whatever it is belongs to the reader's thread, and is raised there
            self.error = error
        finally:
            self.queue.put(None)


def pieces(tokenizer: Any, generation: Callable[[Pieces], Any]) -> Iterator[str]:
    """The text that ``generation(streamer)`` writes, in pieces; it starts with the first one asked for.

    Closing the iterator ends the generation at its next token, and waits for that. What the generation raises is raised
    here.
    """
    streamer = Pieces(tokenizer)
    openmp.release()
    thread = threading.Thread(target=streamer.run, args=(generation,), name="specdec stream")
    thread.start()
    try:
        while (piece := streamer.queue.get()) is not None:
            yield piece
    finally:
        streamer.abandoned = True
        thread.join()
    if streamer.error is not None:
        raise streamer.error
