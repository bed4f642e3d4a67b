"""One conversation among those of a pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.statistics import Stats

if TYPE_CHECKING:
    from specdec.pool import SessionPool

TURNS_KEPT = 100


class PooledSession:
    """A ``Session``'s face on a pool: each turn is a request of the pool's, in one namespace.

    A turn's prompt is read from where it differs from what the pool has kept of the namespace's texts.

    Args:
        pool: answers; it is not closed with the session.
        namespace: whose memory drafters may use.

    Attributes:
        turns: ``Stats`` of each of the last hundred turns.
    """

    def __init__(self, pool: SessionPool, namespace: str = "") -> None:
        self.pool, self.namespace, self.closed = pool, namespace, False
        self.turns = deque[Stats](maxlen=TURNS_KEPT)

    def generate(self, prompt: Any, **arguments: Any) -> Any:
        """One turn; see ``SessionPool.generate``."""
        self._open()
        self.pool.must_not_wait_inside()
        request = self.pool.submit(prompt, namespace=self.namespace, **arguments)
        try:
            return self.pool.result(request)
        finally:
            self.turns.append(request.stats)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **arguments: Any) -> str:
        """One turn: the assistant's answer to a conversation, by the tokenizer's chat template."""
        ids = self._rendered(messages, tools)
        text: str = self.pool.tokenizer.decode(self.generate(ids, **arguments)[0, len(ids) :], skip_special_tokens=True)
        return text

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[Any]:
        """``generate``, piece by piece; see ``SessionPool.stream``. Streamed turns are not among ``turns``."""
        self._open()
        return self.pool.stream(prompt, namespace=self.namespace, **arguments)

    def close(self) -> None:
        """Take no more turns."""
        self.closed = True

    def __enter__(self) -> PooledSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[int]:
        if self.pool.tokenizer is None:
            raise ValueError("this pool has no tokenizer: give one to SessionPool, or pass token ids to generate")
        render = self.pool.tokenizer.apply_chat_template
        rendered = render(list(messages), tools=tools, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])

    def _open(self) -> None:
        if self.closed:
            raise ValueError("this session is closed; make another one")
