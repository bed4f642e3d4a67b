"""What was asked of a pool, and the future of its result."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int

from specdec.statistics import Stats


class Request(Future[Any]):
    """One call of ``generate`` that a pool will answer. ``cancel`` works at any time until the result is there.

    Args:
        prompt: a text, or token ids as a tensor or a list.
        arguments: ``generate``'s.
        namespace: whose memory drafters may use.
        seed: of a random generator of its own; None to draw from torch's.
        timeout: seconds from now after which it fails with TimeoutError; None for never.

    Attributes:
        stats: what was done for it so far.
    """

    def __init__(
        self, prompt: Any, arguments: dict[str, Any], namespace: str, seed: int | None, timeout: float | None
    ) -> None:
        super().__init__()
        self.prompt, self.arguments = prompt, dict(arguments)
        self.streamer = self.arguments.pop("streamer", None)
        self.namespace, self.seed, self.timeout = namespace, seed, timeout
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self.stats = Stats()

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self.deadline

    def encode(self, tokenizer: Any, device: torch.device) -> Int[torch.Tensor, "rows prompt"]:
        """The prompt's token ids; ``arguments`` get what belongs to them. Raises ValueError for lack of a tokenizer."""
        if tokenizer is not None:
            self.arguments.setdefault("tokenizer", tokenizer)
        if not isinstance(self.prompt, str):
            ids = torch.as_tensor(self.prompt, dtype=torch.long, device=device)
            return ids if ids.ndim > 1 else ids[None]
        if tokenizer is None:
            raise ValueError("this pool has no tokenizer: give one to SessionPool, or pass token ids")
        encoded = tokenizer(self.prompt, return_tensors="pt").to(device)
        self.arguments.setdefault("attention_mask", encoded["attention_mask"])
        text: torch.Tensor = encoded["input_ids"]
        return text

    def answer(self, output: Any, prompt: int, tokenizer: Any) -> None:
        """Give the result: for a text the text written behind its ``prompt`` tokens, else what ``generate`` returns."""
        try:
            if self.streamer is not None:
                self.streamer.end()
            if isinstance(self.prompt, str):
                sequences = output if isinstance(output, torch.Tensor) else output.sequences
                output = tokenizer.decode(sequences[0, prompt:], skip_special_tokens=True)
        except Exception as error:  # of a streamer: nobody else's business
            self._settle(None, error)
        else:
            self._settle(output, None)

    def fail(self, error: BaseException) -> None:
        """Give the reason why there is no result; one that was cancelled stays so."""
        if self.streamer is not None:
            with suppress(Exception):  # there is a worse one to tell of
                self.streamer.end()
        self._settle(None, error)

    def give_up(self) -> bool:
        """Whether nobody waits for it any more, or not so long; it is settled then."""
        if not self.cancelled() and not self.late:
            return False
        self.fail(TimeoutError(f"no result within {self.timeout} seconds"))
        return True

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if not self.set_running_or_notify_cancel():
            return
        if error is None:
            self.set_result(result)
        else:
            self.set_exception(error)
