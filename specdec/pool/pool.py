"""Many sessions on one model: whatever is ready is batched into one tree pass."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from specdec import cpu, openmp
from specdec.core import Drafter, Policy
from specdec.memory import Memory
from specdec.pool.engine import Engine
from specdec.pool.feed import END, feed
from specdec.pool.pooled import PooledSession
from specdec.pool.request import Request
from specdec.pool.row import Row
from specdec.speculate import make_drafter
from specdec.statistics import Stats


class PoolFull(RuntimeError):  # noqa: N818
    """Too many requests are waiting already: try again later, or elsewhere."""


class SessionPool:
    """Answers requests of many threads or tasks together, each as if it were alone.

    Requests become rows of one batch as they come, first come first served, and leave it when they are finished: every
    pass of the model verifies one tree for each row (continuous batching). A finished output is that of ``generate``
    for the same prompt alone; one that samples takes its own ``seed`` for that. A request that fails, is cancelled or
    runs out of time takes no other with it.

    What cannot be a row of a batch (several sequences at once, beams, a cache or embeddings of the caller's, models
    that take no trees) is answered by the ordinary path while the others wait; ``stats.reasons`` say so.

    All work is done by one thread, which starts with the first request and ends when there are none. Streamers,
    processors and stopping rules are called in it: they must not wait for the pool. The model must not be changed, nor
    its adapters switched, while there are requests.

    Args:
        model: a transformers causal language model, or a PEFT model around one. It is not wrapped.
        tokenizer: for text; not needed for token ids.
        drafter, policy: see ``Speculate``.
        memory: what was learnt before; with a drafter other than "auto", beside that.
        max_rows: requests that are decoded together.
        max_waiting: requests that may wait for a row.
        max_cache_bytes: of all KV rows, with all that they may grow to; None for no limit. A request waits until it
            fits, and those behind it wait too.
        max_kept_bytes: of the KV rows that are kept of answered texts, for prompts of the same namespace that begin
            as these do; 0 keeps none.
        cpu_kernels: see ``wrap``; they stay in the model when the pool is closed.

    Attributes:
        stats: what was done for all requests.
        outcomes: how many requests have "finished", were "cancelled", ran out of time ("late") or "failed".

    Raises:
        TypeError, ValueError: for what is no model, drafter or policy, and for limits below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        drafter: Drafter | str = "auto",
        policy: Policy | str = "auto",
        memory: Memory | None = None,
        max_rows: int = 16,
        max_waiting: int = 256,
        max_cache_bytes: int | None = None,
        max_kept_bytes: int = 512 << 20,
        cpu_kernels: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
            raise TypeError(
                f"SessionPool: got {type(model).__name__}; give a transformers model with a generate method"
            )
        if min(max_rows, max_waiting, 1 if max_cache_bytes is None else max_cache_bytes) < 1:
            raise ValueError(f"limits are 1 at least: max_rows={max_rows}, {max_waiting=}, {max_cache_bytes=}")
        if max_kept_bytes < 0:
            raise ValueError(f"max_kept_bytes is 0 at least, got {max_kept_bytes}")
        module: Any = getattr(model, "_orig_mod", model)
        self._engine = Engine(module, tokenizer, _joined(drafter, memory), policy, max_cache_bytes, max_kept_bytes)
        self.tokenizer, self.max_rows, self.max_waiting = tokenizer, max_rows, max_waiting
        self.outcomes = Counter[str]()
        self._open, self._waiting, self._closed = set[Future[Any]](), deque[Request](), False
        self._next: Row | None = None  # the first of those who wait, if it has been prepared and did not fit
        self._worker: threading.Thread | None = None  # the last that was started
        self._working = False  # whether it takes more requests
        self._changed = threading.Condition()
        reason = "" if cpu_kernels is False else cpu.install(module)
        if reason and cpu_kernels:
            self.stats.reason(reason)
        openmp.release()  # the thread that makes a pool need not be the one that asks it

    @property
    def stats(self) -> Stats:
        """What was done for all requests."""
        return self._engine.stats

    @property
    def rows_in_use(self) -> int:
        """Requests that are being decoded, or whose prompts are being read."""
        return len(self._engine.rows) + len(self._engine.joining)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting) + (self._next is not None)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV rows of requests that are being answered."""
        return self._engine.cache_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of KV rows of texts that have been answered."""
        return self._engine.kept.bytes_used

    def submit(
        self,
        prompt: Any,
        *,
        timeout: float | None = None,
        namespace: str = "",
        seed: int | None = None,
        **arguments: Any,
    ) -> Request:
        """Ask for a generation, and do not wait for it.

        Args:
            prompt: a text, or token ids as a tensor [1, length] or a list.
            timeout: seconds, waiting among them, after which it fails with TimeoutError; looked at between passes.
            namespace: whose memory drafters may use.
            seed: the output is that of ``torch.manual_seed(seed)`` before ``generate``, whoever else draws meanwhile;
                None to draw from torch's own generator.
            arguments: whatever ``generate`` takes.

        Returns:
            A ``concurrent.futures.Future`` with ``stats``, which can be cancelled until the result is there. For a text
            the result is the text that was written, for ids what ``generate`` returns, without ``past_key_values``.

        Raises:
            PoolFull: ``max_waiting`` requests are waiting.
            ValueError: the pool is closed.
        """
        request = Request(prompt, arguments, namespace, seed, timeout)
        request.add_done_callback(self._settled)
        with self._changed:
            if self._closed:
                raise ValueError("this pool is closed; make another one")
            if sum(not each.cancelled() for each in self._waiting) >= self.max_waiting:
                raise PoolFull(f"{self.max_waiting} requests wait for {self.max_rows} rows, and more may not")
            self._open.add(request)
            self._waiting.append(request)
            if not self._working:
                self._working = True
                openmp.release()
                self._worker = threading.Thread(target=self._work, args=(self._worker,), name="specdec pool")
                self._worker.start()
        return request

    def generate(
        self,
        prompt: Any,
        *,
        timeout: float | None = None,
        namespace: str = "",
        seed: int | None = None,
        **arguments: Any,
    ) -> Any:
        """``submit``, and wait for the result. Raises what the generation raises, TimeoutError among it."""
        self.must_not_wait_inside()
        return self.result(self.submit(prompt, timeout=timeout, namespace=namespace, seed=seed, **arguments))

    def result(self, request: Request) -> Any:
        """Wait for what ``submit`` has returned; who does not wait to the end cancels it."""
        try:
            return request.result()
        finally:
            request.cancel()  # after an interrupt, say

    async def agenerate(
        self,
        prompt: Any,
        *,
        timeout: float | None = None,
        namespace: str = "",
        seed: int | None = None,
        **arguments: Any,
    ) -> Any:
        """``generate`` for asyncio; a task that is cancelled cancels its request."""
        request = self.submit(prompt, timeout=timeout, namespace=namespace, seed=seed, **arguments)
        return await asyncio.wrap_future(request)

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[Any]:
        """``generate``, piece by piece: text for a text, token ids for ids. Takes what ``generate`` takes.

        Closing the iterator, or leaving its loop, cancels the request.
        """
        self.must_not_wait_inside()
        pieces = SimpleQueue[Any]()
        request = self._fed(prompt, pieces.put, arguments)

        def read() -> Iterator[Any]:
            try:
                while (piece := pieces.get()) is not END:
                    yield piece
                request.result()
            finally:
                request.cancel()

        return read()

    def astream(self, prompt: Any, **arguments: Any) -> AsyncIterator[Any]:
        """``stream`` for asyncio; call it where a loop runs."""
        pieces, loop = asyncio.Queue[Any](), asyncio.get_running_loop()
        request = self._fed(prompt, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece), arguments)

        async def read() -> AsyncIterator[Any]:
            try:
                while (piece := await pieces.get()) is not END:
                    yield piece
                request.result()
            finally:
                request.cancel()

        return read()

    def _fed(self, prompt: Any, put: Callable[[Any], Any], arguments: dict[str, Any]) -> Request:
        if arguments.get("streamer") is not None:
            raise ValueError("a stream has its own streamer; give yours to generate or submit")
        streamer = feed(self.tokenizer if isinstance(prompt, str) else None, put)
        request = self.submit(prompt, streamer=streamer, **arguments)
        request.add_done_callback(lambda _: put(END))
        return request

    def session(self, namespace: str = "") -> PooledSession:
        """One conversation, with the face of a ``Session``; as many as you like."""
        return PooledSession(self, namespace)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until there are no requests. Raises TimeoutError after ``timeout`` seconds."""
        self.must_not_wait_inside()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._working, timeout):
                raise TimeoutError(f"{len(self._open)} requests are still to be answered after {timeout} seconds")

    def reset(self) -> None:
        """Forget the KV rows of answered texts, when all are answered: for when the model's weights have changed."""
        self.must_not_wait_inside()
        with self._changed:
            self._changed.wait_for(lambda: not self._working)
            self._engine.kept.clear()

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and wait until those taken are answered, or cancel them. May be called again."""
        with self._changed:
            self._closed = True
            taken = list(self._open)
        for request in taken if cancel else ():
            request.cancel()
        self.drain()
        if self._worker is not None:
            self._worker.join()
        self._engine.kept.clear()

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        self.close(cancel=kind is not None)

    def must_not_wait_inside(self) -> None:
        """Raise RuntimeError where waiting for the pool would be waiting for oneself."""
        if threading.current_thread() is self._worker:
            raise RuntimeError(
                "this would wait for itself: it is called by a streamer, processor or callback of the pool"
            )

    def _settled(self, request: Future[Any]) -> None:
        with self._changed:
            self._open.discard(request)
            self.outcomes[_outcome(request)] += 1

    def _work(self, before: threading.Thread | None) -> None:
        """Answer requests until there are none, once the worker before has put its things away."""
        if before is not None:
            before.join()
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:  # nobody may wait for ever
            self._abandon(error)
            raise
        self._engine.rest()

    def _turn(self) -> bool:
        """One step of all rows, after those who came have joined; whether there is more to do."""
        self._admit()
        self._engine.read_prompts()
        self._engine.step()
        with self._changed:
            if self.waiting or self.rows_in_use:
                return True
            self._working = False
            self._changed.notify_all()
            return False

    def _admit(self) -> None:
        """Let those who wait join, in the order in which they came, while there is room."""
        for request in list(self._waiting):
            if request.give_up():
                self._waiting.remove(request)
        if self._next is not None and self._next.request.give_up():
            self._next = None
        while self.rows_in_use < self.max_rows:
            self._next = self._next or self._prepare_next()
            if self._next is None or not self._engine.admit(self._next):
                return
            self._next = None

    def _prepare_next(self) -> Row | None:
        """The first row of those who wait; requests that are settled instead of becoming one are done with."""
        while self._waiting:
            request = self._waiting.popleft()
            if not request.give_up() and (row := self._engine.prepare(request)) is not None:
                return row
        return None

    def _abandon(self, error: BaseException) -> None:
        with self._changed:
            left, self._waiting = [*self._waiting], deque()
            left += [self._next.request] if self._next is not None else []
            self._working, self._next = False, None
            self._changed.notify_all()
        self._engine.lose(error)
        for request in left:
            request.fail(error)


def _joined(drafter: Drafter | str, memory: Memory | None) -> Drafter:
    from specdec.drafters import MergedDrafter

    if memory is None:
        return make_drafter(drafter)
    return memory if drafter == "auto" else MergedDrafter([make_drafter(drafter), memory])


def _outcome(request: Future[Any]) -> str:
    if request.cancelled():
        return "cancelled"
    error = request.exception()
    return "finished" if error is None else "late" if isinstance(error, TimeoutError) else "failed"
