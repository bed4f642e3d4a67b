"""What a drafter has learnt, kept apart by namespace, and only so much of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar


class Memory(Protocol):
    """What is kept for one namespace."""

    @property
    def bytes_used(self) -> int:
        """Bytes held."""
        ...


Kept = TypeVar("Kept", bound=Memory)


class Namespaces(Generic[Kept]):
    """A memory for each namespace, in order of use. Where there are too many the least recently used are forgotten.

    Threads may share it; what is in a memory, they must guard themselves.

    Args:
        make: makes an empty memory.
        most: namespaces at most, None for any number.
        max_bytes: of all memories together, None for any. The last used one stays, whatever its size.

    Attributes:
        make: as given.

    Raises:
        ValueError: most below 1.
    """

    def __init__(self, make: Callable[[], Kept], most: int | None = None, max_bytes: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"namespaces must be at least 1, got {most}")
        self.make, self._most, self._max_bytes = make, most, max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, namespace: str) -> Kept:
        """Its memory, an empty one if it has none; the namespace is now the last used."""
        with self._lock:
            memory = self._kept.get(namespace)
            if memory is None:
                memory = self._kept[namespace] = self.make()
                self._forget_oldest()
            self._kept.move_to_end(namespace)
            return memory

    def items(self) -> dict[str, Kept]:
        """All memories as they are now, least recently used first."""
        with self._lock:
            return dict(self._kept)

    def forget(self, namespace: str | None = None) -> None:
        """Forget one namespace, or all."""
        with self._lock:
            if namespace is None:
                self._kept.clear()
            else:
                self._kept.pop(namespace, None)

    def replace(self, memories: Mapping[str, Kept]) -> None:
        """Keep these instead, least recently used first."""
        with self._lock:
            self._kept = OrderedDict(memories)
            self._forget_oldest()

    def trim(self) -> None:
        """Forget the least recently used where memories have grown too large."""
        with self._lock:
            self._forget_oldest()

    @property
    def bytes_used(self) -> int:
        """Bytes held by all memories."""
        return sum(memory.bytes_used for memory in self.items().values())

    def _forget_oldest(self) -> None:
        while self._most is not None and len(self._kept) > self._most:
            self._kept.popitem(last=False)
        if self._max_bytes is not None:
            used = sum(memory.bytes_used for memory in self._kept.values())
            while used > self._max_bytes and len(self._kept) > 1:
                used -= self._kept.popitem(last=False)[1].bytes_used
