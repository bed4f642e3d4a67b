"""One request's answers while a pool writes them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any

from transformers.generation.logits_process import LogitsProcessor

from specdec.pool import PoolFull, SessionPool
from specdec.pool.engine import TooLarge
from specdec.pool.feed import TokenFeed
from specdec.pool.request import Request
from specdec.server.choice import Choice, Piece, Token
from specdec.server.errors import ApiError
from specdec.server.likelihoods import Likelihoods
from specdec.server.predictions import Predictions
from specdec.server.text import Stopping

RETRY = {"Retry-After": "1"}


class Writing:
    """Answers that are being written, each a request of the pool's. Make it where a loop runs, and close it.

    Args:
        pool: writes.
        prompts: token ids.
        each: how many answers to each prompt.
        namespace: whose memory drafters may use.
        seed: of the first answer; each later one has the next.
        timeout: seconds.
        arguments: of ``generate``, for each prompt.
        stops: strings that end a text.
        ends: tokens that end it.
        best: how many of the likeliest tokens to note with each token; None to note nothing.
        calls: whether to look for calls of tools.
        processors: makes an answer's own logits processors, given the length of its prompt.
        predictions, prediction: where to say that the answers will resemble some tokens.

    Attributes:
        choices: the answers, those to the first prompt first.

    Raises:
        ApiError: too much is waiting, or the pool is closed.
    """

    def __init__(
        self,
        pool: SessionPool,
        prompts: Sequence[Sequence[int]],
        each: int,
        *,
        namespace: str,
        seed: int,
        timeout: float,
        arguments: Sequence[dict[str, Any]],
        stops: Sequence[str],
        ends: Collection[int],
        best: int | None,
        calls: bool,
        processors: Callable[[int], list[LogitsProcessor]],
        predictions: Predictions,
        prediction: Sequence[int] | None,
    ) -> None:
        self._pool, self._prompts, self._timeout, self._stops, self._best = pool, prompts, timeout, stops, best
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Token | None]]()
        self._processors = processors
        self._requests: list[Request] = []
        self._expected = ExitStack()
        self.choices = [Choice(pool.tokenizer, stops, ends, calls) for _ in range(len(prompts) * each)]
        try:
            for prompt in prompts:
                self._expected.enter_context(predictions.expecting(namespace, prompt, prediction))
            for i in range(len(self.choices)):
                self._submit(i, prompts[i // each], namespace, (seed + i) % 2**63, arguments[i // each])
        except BaseException:
            self.close()
            raise

    def _submit(self, i: int, prompt: Sequence[int], namespace: str, seed: int, arguments: dict[str, Any]) -> None:
        likelihoods = None if self._best is None else Likelihoods(self._best)

        def put(token: int | None) -> None:
            noted = None if likelihoods is None or token is None else likelihoods.take(token)
            item = i, None if token is None else Token(token, noted)
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

        parts: dict[str, Any] = {"streamer": TokenFeed(put)}
        processors = [likelihoods] if likelihoods is not None else []  # first: it notes what the model itself thinks
        if processors := [*processors, *self._processors(len(prompt))]:
            parts["logits_processor"] = processors
        if self._stops:
            parts["stopping_criteria"] = [Stopping(self._pool.tokenizer, self._stops)]
        try:
            request = self._pool.submit(
                list(prompt), timeout=self._timeout, namespace=namespace, seed=seed, **arguments, **parts
            )
        except PoolFull as error:
            raise ApiError(429, f"{error}; try again later", "rate_limit_exceeded", headers=RETRY) from error
        except ValueError as error:  # the pool is closed
            raise ApiError(503, "the server is shutting down", "shutting_down") from error
        self._requests.append(request)
        request.add_done_callback(lambda _: put(None))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Whatever becomes certain of any answer, with its number. Raises ApiError, or what a generation raises."""
        writing = len(self._requests)
        while writing:
            i, token = await self._queue.get()
            if token is None:
                _check(self._requests[i])
                writing -= 1
            piece = self.choices[i].add(token) if token is not None else self.choices[i].end()
            if piece:
                yield i, piece

    def usage(self) -> dict[str, Any]:
        """What the answers took, in OpenAI's words, and how speculation did."""
        prompt, written = sum(map(len, self._prompts)), sum(choice.tokens for choice in self.choices)
        stats = [request.stats for request in self._requests]
        counts = [each.by_drafter.get(Predictions.name, {"drafted": 0, "accepted": 0}) for each in stats]
        drafted, accepted = (sum(count[name] for count in counts) for name in ("drafted", "accepted"))
        steps = sum(each.steps for each in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in stats)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "specdec": {
                "steps": steps,
                "tokens_per_step": sum(each.tokens for each in stats) / steps if steps else None,
            },
        }

    def close(self) -> None:
        """Give up what is not written yet. May be called again."""
        for request in self._requests:
            request.cancel()
        self._expected.close()


def _check(request: Request) -> None:
    try:
        request.result(0)
    except TimeoutError as error:
        raise ApiError(504, f"{error}: ask for fewer tokens, or try again later", "timeout") from error
    except concurrent.futures.CancelledError as error:
        raise ApiError(503, "the server is shutting down", "shutting_down") from error
    except TooLarge as error:
        raise ApiError(400, str(error), "context_length_exceeded") from error
