"""One generation, measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdec.bench.counts import Counted
from specdec.bench.methods import Method


@dataclass(frozen=True, slots=True)
class Run:
    """One greedy generation.

    Attributes:
        tokens: the generated ids.
        passes: the target's passes, the prompt's included; 0 where they cannot be counted.
        prefill: seconds from the call until the first tokens came: preparation and the prompt's pass.
        decode: seconds from the first tokens to the last.
        decoded: tokens that came in ``decode``: all but those that came first.
        counted: what a wrapped model counted; None of others.
    """

    tokens: list[int]
    passes: int
    prefill: float
    decode: float
    decoded: int
    counted: Counted | None = None

    @property
    def total(self) -> float:
        """Seconds for everything."""
        return self.prefill + self.decode


class Stopwatch:
    """A streamer that notes when tokens come; every method is given the same one, so that it weighs on all alike."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self.start()

    def start(self) -> None:
        """From now on time counts."""
        self.times, self.counts, self._prompt_seen = [time.perf_counter()], [], False

    def put(self, value: torch.Tensor) -> None:
        """Note the arrival of some tokens. The first call brings the prompt, before or after its pass: passed over."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def measure(method: Method, ids: Sequence[int], max_new_tokens: int) -> Run:
    """Generate greedily from ``ids`` and take the times."""
    prompt = torch.tensor([ids], device=method.model.device)
    if method.counts is not None:
        method.counts.reset()
    watch = Stopwatch()
    output = method.generate(
        prompt,
        watch,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    start, first, last = watch.times[0], watch.times[1], watch.times[-1]
    tokens = output[0, len(ids) :].tolist()
    counted = None if method.counts is None else method.counts.counted()
    passes = counted["steps"] if counted else len(watch.counts) if method.by_step else 0
    return Run(tokens, passes, first - start, last - first, len(tokens) - watch.counts[0], counted)
