"""What drafters have learnt, shared by sessions, bounded, and kept in a file."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from specdec import memory_file, transcripts
from specdec.adapters import INSIDE
from specdec.core import Budget, Context, Drafter, DraftTree, Verdict
from specdec.speculate import auto_drafter, make_drafter

NOTHING = Budget(0, 0, 0)
PIECE = 4096  # tokens that are learnt at a time: a drafter may index a text while it is open
LEAST_BYTES = 1 << 20


class Memory:
    """A drafter that sessions share: it guesses for each namespace from what was written there, and nowhere else.

    Namespaces keep tenants, agents and adapters apart: no token of one is ever guessed in another. What they share are
    rates, which say how often guesses of a kind come true. Where all of it takes more than ``max_bytes``, the least
    recently used namespace is forgotten; a session that is still writing there goes on with what is left.

    It has no threads of its own. Sessions in several threads may share it, if the drafter may be shared.

    Args:
        max_bytes: of all namespaces together.
        drafter: what learns; "auto" for all drafters that learn from text alone, or see ``Speculate``.
        namespaces: how many are kept, whatever their size.

    Attributes:
        drafter: what learns.

    Raises:
        ValueError: less than 1 MB, no namespaces, or an unknown drafter.
    """

    def __init__(self, max_bytes: int = 1 << 30, drafter: Drafter | str = "auto", namespaces: int = 64) -> None:
        if max_bytes < LEAST_BYTES or namespaces < 1:
            raise ValueError(
                f"a memory needs max_bytes >= {LEAST_BYTES} and a namespace, got {max_bytes} and {namespaces}"
            )
        self.max_bytes, self.most_namespaces = max_bytes, namespaces
        # One namespace alone must fit, or it would be forgotten again and again.
        self.drafter = auto_drafter(max_bytes // 2, namespaces) if drafter == "auto" else make_drafter(drafter)
        self.name, self.topk, self.hidden = self.drafter.name, self.drafter.topk, self.drafter.hidden
        self._used = OrderedDict[str, None]()
        self._lock = threading.Lock()

    @property
    def bind(self) -> Callable[[Any, Sequence[Context]], str] | None:
        """The drafter's own, which hands it the target; None where it works without."""
        bind: Callable[[Any, Sequence[Context]], str] | None = getattr(self.drafter, "bind", None)
        return bind

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, as the drafter guesses; at the end of a sequence what is too much is forgotten."""
        for context in contexts:
            self._use(context.namespace)
        drafted = self.drafter.draft(contexts, budgets)
        if any(context.finished for context in contexts):
            self._forget_oldest()
        return drafted

    def warm(self, texts: Iterable[Any], tokenizer: Any = None, namespace: str = "") -> int:
        """Learn past texts as if they had been written here; the number of tokens.

        Args:
            texts: each a text, a list of token ids, or a conversation: a list of messages, of which the assistant's
                are learnt as the tokenizer's chat template writes them.
            tokenizer: for all but token ids.

        Raises:
            ValueError: a text without a tokenizer, or something that is none of these.
        """
        learnt = 0
        for text in texts:
            for response in transcripts.responses(text, tokenizer):
                self._learn(np.asarray(response, np.int64), namespace)
                learnt += len(response)
        return learnt

    def forget(self, namespace: str | None = None) -> None:
        """Forget a namespace with all adapters in it, or everything."""
        with self._lock:
            gone = [name for name in self._used if namespace in (None, name, name.partition(INSIDE)[0])]
        for name in gone:
            self._drop(name)
        if namespace is None and hasattr(self.drafter, "reset"):
            self.drafter.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to ``path``, which changes at once or, on OSError, not at all.

        Any number of processes may read the file meanwhile. Of several that write, the last one's memory stays; to add
        to what another has saved, ``load`` that into a memory of its own and ``merge`` it first.

        Raises:
            TypeError: the drafter has nothing that can be saved.
        """
        memory_file.write(path, self.drafter, self.namespaces)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace everything by what ``save`` wrote, of the same drafters; on an error nothing changes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of other drafters, or no memory.
            TypeError: the drafter has nothing that can be loaded.
        """
        names = memory_file.read(path, self.drafter)
        with self._lock:
            self._used = OrderedDict.fromkeys(names)
        self._forget_oldest()

    def merge(self, other: Memory) -> tuple[str, ...]:
        """Learn what ``other`` has and this memory has not.

        Its past responses, which suffix decoding keeps, are entered as if written here, those left out that are known;
        so they reach everything that learns from text. Of Token Recycling's candidates those of tokens that were never
        fed here are taken over. Rates stay this memory's own.

        Returns:
            Names of the other's drafters that have learnt something which cannot be merged.

        Raises:
            ValueError: both recycle tokens, with other numbers of candidates.
        """
        known = {(namespace, response.tobytes()) for namespace, response in memory_file.responses(self.drafter)}
        for namespace, response in memory_file.responses(other.drafter):
            if (namespace, response.tobytes()) not in known:
                self._learn(response.astype(np.int64), namespace)
        for namespace in memory_file.merge_candidates(self.drafter, other.drafter):
            self._use(namespace)
        self._forget_oldest()
        return memory_file.unmerged(self.drafter, other.drafter)

    @property
    def namespaces(self) -> list[str]:
        """What is remembered, least recently used first; the part of an adapter comes as "namespace\\0adapter"."""
        with self._lock:
            return list(self._used)

    @property
    def bytes_used(self) -> int:
        """Bytes held for all namespaces, and for the texts that are being written."""
        return int(getattr(self.drafter, "bytes_used", 0))

    def take_faults(self) -> list[tuple[str, str]]:
        """What parts of the drafter did wrong and nobody has taken note of yet."""
        take = getattr(self.drafter, "take_faults", list)
        faults: list[tuple[str, str]] = take()
        return faults

    def _learn(self, response: Int[np.ndarray, " length"], namespace: str) -> None:
        """Show the drafter a finished response, in pieces that are learnt apart."""
        for start in range(0, len(response), PIECE):
            tokens = response[start : start + PIECE]
            context = Context(tokens[:0], namespace)
            context.extend(Verdict(DraftTree.root(int(tokens[0])), np.zeros(1, np.int64), tokens))
            context.finished = True
            self.draft([context], [NOTHING])

    def _use(self, namespace: str) -> None:
        with self._lock:
            self._used[namespace] = None
            self._used.move_to_end(namespace)

    def _forget_oldest(self) -> None:
        while len(names := self.namespaces) > self.most_namespaces or (names and self.bytes_used > self.max_bytes):
            self._drop(names[0])

    def _drop(self, namespace: str) -> None:
        with self._lock:
            self._used.pop(namespace, None)
        drafter: Any = self.drafter
        if hasattr(drafter, "save"):  # what cannot be saved keeps nothing by namespace
            drafter.reset(namespace)
