"""Sixteen sessions at once for many turns, while drafters fail, callers give up, and memory and rows are short."""

from __future__ import annotations

import copy
import random
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from specdec.core import Budget, Context, DraftTree
from specdec.drafters import MergedDrafter, SuffixDrafter
from specdec.policies import FixedPolicy
from specdec.pool import PoolFull, SessionPool
from tests import tiny
from tests.tiny import quietly

THREADS = 16
CACHE_BYTES, MEMORY_BYTES = 4_500_000, 1 << 20
LONGEST = 40  # tokens of a session before it starts anew
SAID = [[7, 8, 9], [20, 21, 22, 23, 24, 25, 26, 27], [90]]  # what callers say: seldom anything new
CANARIES = [80, 81, 82, 83]  # each namespace's own token: its callers alone say it, and no model does


class Faulty(SuffixDrafter):
    """Raises or returns nonsense now and then."""

    name = "faulty"

    def draft(self, contexts: Any, budgets: list[Budget]) -> Any:
        chance = random.random()
        if chance < 0.05:
            raise ZeroDivisionError("by none")
        trees = super().draft(contexts, budgets)
        if chance < 0.1:
            return trees[1:]
        return [self.wrong(context) for context in contexts] if chance < 0.15 else trees

    def wrong(self, context: Context) -> DraftTree:
        """A sound tree whose guesses are not."""
        return DraftTree.chain(int(context.tokens[-1]), [5, 6, 7], [0.9, 0.8, 0.7], self.name)


class Watched(MergedDrafter):
    """Counts trees that guess a namespace's own canary, and those that guess another's."""

    own = leaks = 0

    def draft(self, contexts: Any, budgets: list[Budget]) -> list[DraftTree]:
        trees = super().draft(contexts, budgets)
        for context, tree in zip(contexts, trees, strict=True):
            own, guessed = CANARIES[int(context.namespace)], set(tree.tokens[1:].tolist()).intersection(CANARIES)
            self.own += own in guessed
            self.leaks += bool(guessed - {own})
        return trees


class Session(threading.Thread):
    """One caller: each turn goes on where the last one ended, and some are given up."""

    def __init__(self, pool: SessionPool, number: int, turns: int) -> None:
        super().__init__()
        self.pool, self.number, self.turns = pool, number, turns
        self.random = random.Random(number)
        self.finished: list[tuple[list[int], dict[str, Any], list[int]]] = []
        self.given_up = self.refused = 0
        self.most_bytes = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            text: list[int] = []
            for _ in range(self.turns):
                text = self.turn((text if len(text) < LONGEST else []) + self.said())
        except BaseException as error:  # reported by the test
            self.error = error

    def said(self) -> list[int]:
        """What the caller says, the canary behind each token."""
        return [each for token in self.random.choice(SAID) for each in (token, CANARIES[self.number % 4])]

    def turn(self, text: list[int]) -> list[int]:
        """One request; the text after it."""
        arguments = self.arguments()
        timeout = self.random.uniform(0, 0.05) if self.random.random() < 0.08 else None
        request = self.ask(text, timeout, arguments)
        if self.random.random() < 0.12:
            time.sleep(self.random.uniform(0, 0.05))
            request.cancel()
        self.most_bytes = max(self.most_bytes, self.pool.cache_bytes)
        try:
            output = request.result(120)[0].tolist()
        except (CancelledError, TimeoutError):
            assert request.done(), "nobody may wait for ever"
            self.given_up += 1
            return text
        self.finished.append((text, arguments, output))
        return output

    def ask(self, text: list[int], timeout: float | None, arguments: dict[str, Any]) -> Any:
        while True:
            try:
                return self.pool.submit(text, timeout=timeout, namespace=str(self.number % 4), **arguments)
            except PoolFull:
                self.refused += 1
                time.sleep(0.005)

    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"max_new_tokens": self.random.choice([1, 4, 8, 16])}
        match self.random.randrange(8):
            case 0:
                return {**arguments, "do_sample": True, "seed": self.random.randrange(1000), "top_p": 0.9}
            case 1:
                return {**arguments, "repetition_penalty": 1.2}
            case 2:
                return {**arguments, "eos_token_id": [*range(3, 10)]}
        return arguments


@pytest.mark.parametrize("turns", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_every_finished_output_is_its_single_sessions(kind: str, turns: int) -> None:
    random.seed(0)
    model = tiny.build(kind, **({} if kind == "Llama" else {"sliding_window": 7, "head_dim": 8})).double()
    model.generation_config.suppress_tokens = CANARIES
    reference = copy.deepcopy(model)
    drafter = Watched([SuffixDrafter(max_bytes=MEMORY_BYTES, min_probability=0.02), Faulty(max_bytes=MEMORY_BYTES)])
    pool = SessionPool(
        model, drafter=drafter, policy=FixedPolicy(8, 4, 4), max_rows=12, max_waiting=3, max_cache_bytes=CACHE_BYTES
    )
    with quietly(), pool:
        sessions = [Session(pool, number, turns) for number in range(THREADS)]
        for session in sessions:
            session.start()
        for session in sessions:
            session.join()
        pool.drain(60)
    assert [session.error for session in sessions] == [None] * THREADS
    assert (pool.rows_in_use, pool.waiting, pool.cache_bytes) == (0, 0, 0)
    assert pool.outcomes.total() == THREADS * turns
    assert pool.outcomes["failed"] == 0
    assert sum(session.given_up for session in sessions) > turns / 4
    assert sum(session.refused for session in sessions) > 0
    assert 0 < max(session.most_bytes for session in sessions) <= CACHE_BYTES
    assert all(part.bytes_used <= 4 * 1.1 * MEMORY_BYTES for part in drafter.drafters)  # of four namespaces
    assert pool.stats.fault_count > turns / 4
    assert pool.stats.accepted > 2 * turns
    assert drafter.own > 0
    assert drafter.leaks == 0
    for session in sessions:
        assert len(session.finished) > turns / 4
        for text, arguments, output in session.finished:
            assert output == alone(reference, text, **arguments)


def alone(model: Any, text: list[int], seed: int = 0, **arguments: Any) -> list[int]:
    torch.manual_seed(seed)
    output: list[int] = model.generate(torch.tensor([text]), **arguments)[0].tolist()
    return output
