"""Many requests through one model, one step at a time; no threads here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from specdec import adapters
from specdec.ahead import Ahead, useful
from specdec.attach import Attachment
from specdec.attached import attach_once
from specdec.cache import GROWTH
from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Unsupported, Verdict
from specdec.decoder import Decoder
from specdec.generate import Generate
from specdec.guard import GuardedDrafter
from specdec.model import Pass
from specdec.policies import ThroughputPolicy
from specdec.policies.throughput import Text
from specdec.pool.alone import run_alone
from specdec.pool.batch import Batch
from specdec.pool.kept import ALIKE, Kept, KeptText
from specdec.pool.request import Request
from specdec.pool.row import Preparation, Prepared, Row
from specdec.prefix import common
from specdec.speculate import Speculate
from specdec.statistics import Stats

PROMPT_TOKENS = 512  # of prompts that are read between two steps: what those who are writing wait for
TREE = 128  # slots for the nodes of a pass


class TooLarge(ValueError):  # noqa: N818
    """A request whose KV rows would not fit even if it were the only one."""


class RowsPolicy(ThroughputPolicy):
    """A ThroughputPolicy for rows that come and go: a step costs what its rows do, and none waits for another."""

    def _weights(self, contexts: Sequence[Context]) -> Float[np.ndarray, " rows"]:
        return np.full(len(contexts), 1 / len(contexts))

    def _learn(self, contexts: Sequence[Context]) -> Text | None:
        text = super()._learn(contexts)
        if text is not None:
            text = copy(text)  # the step it was made for has been counted with the rows it had
            text.rows = len(contexts)
        return text


class Engine:
    """Reads prompts, steps all rows together, and lets rows go when they are finished, given up, or at fault.

    Every row is judged by its own sampler, so one that fails takes no other with it.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        tokenizer: for requests that are text.
        drafter, policy: see ``Speculate``.
        max_cache_bytes: of all KV rows; None for no limit.
        max_kept_bytes: of those that are kept when their requests have ended.

    Attributes:
        stats: what was done for all requests.
        kept: KV rows of texts that have been answered.
        rows: those that step together; ``joining``: those whose prompts are being read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        drafter: Drafter | str = "auto",
        policy: Policy | str = "auto",
        max_cache_bytes: int | None = None,
        max_kept_bytes: int = 0,
    ) -> None:
        self.kept = Kept(max_kept_bytes)
        self.model, self.tokenizer, self.max_cache_bytes = model, tokenizer, max_cache_bytes
        preparation = Preparation(drafter, policy, on_unsupported="error")
        ordinary = Speculate(preparation.drafter, policy)
        preparation.trial = ordinary.trial = attach_once
        wrapped = vars(model).get("generate")
        shadowed = getattr(wrapped, "shadowed", wrapped)
        self._prepare, self._alone = (Generate(model, each, shadowed) for each in (preparation, ordinary))
        self.stats = preparation.stats = ordinary.stats = Stats()
        vocab = int(model.config.get_text_config(decoder=True).vocab_size)
        guarded = GuardedDrafter(preparation.drafter, self.stats, vocab)
        self._ahead = Ahead(guarded, self.stats) if useful(preparation.drafter, model.device) else None
        self.policy, self.drafter = policy, self._ahead or guarded
        self.rows, self.joining = list[Row](), deque[Row]()
        self._attachment: Attachment | None = None
        self._bytes_of_token = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV rows that are held now."""
        joining = sum(row.bytes for row in self.joining)
        return joining + (self.batch.cache.bytes if self._attachment is not None else 0)

    def prepare(self, request: Request) -> Row | None:
        """The row that a request will be; None if it is settled: it failed, or could not be a row and ran alone."""
        try:
            ids = request.encode(self.tokenizer, self.model.device)
            try:
                namespace = adapters.within(request.namespace, adapters.active(self.model))
                return Row(request, self._prepared(ids, request), self.drafter, self.stats, namespace)
            except Unsupported as why:
                self._run_alone(request, ids, why)
        except Exception as error:  # whatever a request's arguments lead to is for who made it
            request.fail(error)
        return None

    def _prepared(self, ids: torch.Tensor, request: Request) -> Prepared:
        if request.arguments.get("adapter_names") is not None:
            raise Unsupported("it names adapters for its rows")
        try:
            prepared: Prepared = self._prepare(ids, **request.arguments)
        except ValueError as error:
            if isinstance(error.__cause__, Unsupported):
                raise error.__cause__ from None
            raise
        return prepared

    def _run_alone(self, request: Request, ids: torch.Tensor, why: Unsupported) -> None:
        """Answer a request that cannot be a row, while those wait."""
        self.stats.reason(f"a request ran alone: {why}")
        namespace = adapters.within(request.namespace, adapters.active(self.model))
        run_alone(request, ids, self._alone, namespace, self.tokenizer)

    def admit(self, row: Row) -> bool:
        """Let a row join as soon as its prompt is read; False if there is no memory for it now."""
        try:
            if not self._fits(row):
                return False
            self.joining.append(row)
        except TooLarge as error:
            row.request.fail(error)
        return True

    def _fits(self, row: Row) -> bool:
        if self.max_cache_bytes is None:
            return True
        if not self._bytes_of_token:  # only the first row's prompt will tell
            return not self.joining
        self._check_size(row)
        left = self._left(row)
        if left >= 0:
            self.kept.shrink(left)
        return left >= 0

    def _left(self, *more: Row) -> int:
        """Bytes that are left for rows of answered texts, whatever the others, and some ``more``, grow to."""
        if self.max_cache_bytes is None:
            return self.kept.max_bytes
        joining = [*self.joining, *more]
        return self.max_cache_bytes - self._bytes([*self.rows, *joining], joining, *self.batch.cache.capacity)

    def _check_size(self, row: Row) -> None:
        most, need = self.max_cache_bytes, self._bytes([row], [row])
        if most is not None and need > most:
            raise TooLarge(
                f"up to {row.longest} tokens need {need} bytes of KV rows, and max_cache_bytes is {most}: ask for fewer"
                " new tokens, shorten the prompt, or allow more"
            )

    def _bytes(self, rows: Sequence[Row], joining: Sequence[Row], held: int = 0, slots: int = 0) -> int:
        """Most bytes that some rows may come to hold, with buffers of so many rows and slots at least."""
        longest = max(row.longest for row in rows) + TREE
        slots = max(slots, longest + max(2 * GROWTH, longest // 2))
        places = max(held, 1 << (len(rows) - 1).bit_length())
        prompts = sum(2 * row.prompt_length + GROWTH for row in joining)  # which are held twice when they join
        return self._bytes_of_token * (places * slots + prompts)

    def read_prompts(self) -> None:
        """Read on in the prompts of joining rows, each in its turn; rows whose prompts are read join the others."""
        left = PROMPT_TOKENS
        while left > 0 and (row := next((row for row in self.joining if not self._waits(row)), None)):
            self.joining.remove(row)
            try:
                if not row.read and row.reader:
                    self._begin_behind(row)
                left -= row.read_prompt(left)
                if row.ready:
                    self._join(row)
                else:
                    self.joining.append(row)
            except Unsupported as why:
                self._rerun(row, why)
            except Exception as error:  # of this row's own prompt
                row.request.fail(error)

    def _waits(self, row: Row) -> bool:
        """Whether a row's prompt is read sooner behind another's that begins alike and is nearly read, than anew."""
        reading = [other for other in self.joining if other.read]
        return not row.read and any(_alike(other, row) >= max(ALIKE, other.unread) for other in reading)

    def _begin_behind(self, row: Row) -> None:
        """Begin a prompt behind the rows that it has in common with another text, answered or not."""
        prompt = row.context.tokens
        length, text = self.kept.longest(row.reader, prompt)
        layers = text.layers if text else ()
        for place, other in enumerate(self.rows):
            alike = min(_alike(other, row), self.batch.lengths[place])
            if alike > length:
                length, layers = alike, self.batch.cache.rows(place)
        if length >= ALIKE:
            row.begin_behind(layers, min(length, len(prompt) - 1))

    def _rerun(self, row: Row, why: Unsupported) -> None:
        try:
            self._run_alone(row.request, row.prepared.input_ids, why)
        except Exception as error:  # a warning that was made an error
            row.request.fail(error)

    def _join(self, row: Row) -> None:
        if not self.rows:
            self._open(row.prepared)
        self._bytes_of_token = row.bytes_of_token
        self._check_size(row)
        row.join(self.batch)
        self.rows.append(row)
        self.stats.generations += 1
        try:
            row.begin()
        except Exception as error:  # of a processor, a stopping rule, a streamer
            row.error = error

    def _open(self, prepared: Prepared) -> None:
        """A new batch; what is known of the model stays."""
        known, self._attachment = self._attachment, prepared.attachment
        self.batch = Batch(prepared.module, prepared.attachment.form)
        if known is not self._attachment:
            policy = RowsPolicy(self._attachment.costs) if isinstance(self.policy, str) else self.policy
            self.decoder = Decoder(self.drafter, self, policy, Unobserved(), self._room)

    def step(self) -> None:
        """Draft, verify and extend for all rows; those that are done leave."""
        self.sweep()
        if not self.rows:
            return
        contexts = [row.context for row in self.rows]
        try:
            self.decoder.step(contexts, contexts)
        except Exception as error:  # of the pass itself: there is no row to blame, and none can go on
            self.lose(error)
        self.sweep()

    def verify(self, contexts: Sequence[Context], batch: Sequence[DraftTree]) -> list[Verdict]:
        """One pass over every tree; each row judges its own, and the accepted paths' KV rows are kept."""
        start = time.perf_counter()
        with self.stats.clock("verify"):
            passed = self.batch.forward(batch, self.drafter.hidden)
        if self._ahead is not None:
            self._ahead.meanwhile()
        with self.stats.clock("verify"):
            passed.wait()
        seconds = time.perf_counter() - start
        shares = [_share(passed, place, len(tree)) for place, tree in enumerate(batch)]
        verdicts = [row.judge(tree, share, seconds) for row, tree, share in zip(self.rows, batch, shares, strict=True)]
        with self.stats.clock("cache"):
            self.batch.keep([verdict.path.tolist() for verdict in verdicts])
        return verdicts

    def _room(self, context: Context) -> int:
        return next(row.room(context) for row in self.rows if row.context is context)

    def sweep(self) -> None:
        """Let go of rows that are finished, at fault or given up."""
        for row in list(self.rows):
            if row.error is not None or row.finished or row.request.give_up():
                self._leave(row)
        self.joining = deque(row for row in self.joining if not row.request.give_up())

    def _leave(self, row: Row) -> None:
        place = self.rows.index(row)
        if row.reader and row.error is None:
            self._keep(row, place)
        self.batch.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()
        if row.error is not None:
            row.request.fail(row.error)
        elif row.finished:
            row.context.finished = True
            self.drafter.draft([row.context], [Budget(0, 0, 0)])  # the last chance to learn from the end
            row.request.answer(row.output(), row.prompt_length, self.tokenizer)

    def _keep(self, row: Row, place: int) -> None:
        """Keep a row's text for later prompts; for lack of memory, keep none."""
        tokens = row.context.tokens[: self.batch.lengths[place]]
        try:
            self.kept.keep(KeptText(row.reader, tokens, self.batch.cache.rows(place)), self._left())
        except (RuntimeError, MemoryError) as error:
            self.kept.clear()
            self.stats.reason(f"rows of answered texts were given up: {error}")

    def lose(self, error: BaseException) -> None:
        """Fail all rows, and give all memory back."""
        rows, self.rows, self.joining = [*self.rows, *self.joining], [], deque()
        if self._attachment is not None:
            self.batch.clear()
        self.kept.clear()
        for row in rows:
            row.request.fail(error)

    def rest(self) -> None:
        """Keep what was learnt about the model's passes; for when there is nothing to do."""
        if self._attachment is not None and self._attachment.costs is not None:
            self._attachment.costs.keep()


class Unobserved:
    """What a decoder tells about its steps is told to nobody: rows count for themselves."""

    def observe(self, verdict: Verdict) -> None:
        """Nothing."""


def _alike(one: Row, other: Row) -> int:
    """How many tokens two rows' texts begin with alike, if their KV rows are alike too."""
    return common(one.context.tokens, other.context.tokens) if one.reader and one.reader == other.reader else 0


def _share(passed: Pass, place: int, nodes: int) -> Pass:
    hidden = None if passed.hidden is None else passed.hidden[place : place + 1, :nodes]
    return Pass(passed.logits[place : place + 1, :nodes], hidden)
