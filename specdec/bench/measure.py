"""One generation measured, where two differ, and how sure a median is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import specdec
from specdec.bench.methods import Method


@dataclass(frozen=True, slots=True)
class Run:
    """One greedy generation.

    Attributes:
        tokens: the generated ids.
        passes: the target's passes, the prompt's included; 0 where they cannot be counted.
        prefill: seconds until the first tokens came, the prompt's pass included.
        decode: seconds from the first tokens to the last.
        decoded: tokens that came in ``decode``: all but those that came first.
    """

    tokens: list[int]
    passes: int
    prefill: float
    decode: float
    decoded: int

    @property
    def total(self) -> float:
        """Seconds for everything."""
        return self.prefill + self.decode


class Stopwatch:
    """A streamer that notes when tokens come; every method is given the same one, so that it weighs on all alike."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.counts: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Note the arrival of some tokens; the first call brings the prompt and is passed over."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())
        else:
            self.times = [time.perf_counter()]  # what was done to the model before is not the prompt's
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def measure(method: Method, ids: Sequence[int], max_new_tokens: int) -> Run:
    """Generate greedily from ``ids`` and take the times."""
    prompt = torch.tensor([ids], device=method.model.device)
    before = specdec.stats(method.model).steps if method.wrapped else 0
    watch = Stopwatch()
    output = method.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=watch,
    )
    passes = specdec.stats(method.model).steps - before if method.wrapped else 0
    start, first, last = watch.times[0], watch.times[1], watch.times[-1]
    tokens = output[0, len(ids) :].tolist()
    if method.by_step and not method.wrapped:
        passes = len(watch.counts)
    return Run(tokens, passes, first - start, last - first, len(tokens) - watch.counts[0])


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a method's tokens are not plain ``generate``'s.

    Attributes:
        method: whose tokens differ.
        workload: on which work; ``prompt`` counts from 0 among all prompts.
        position: which generated token, from 0.
        expected: plain ``generate``'s token; None where it had ended.
        got: the method's token; None where it had ended.
        margin: by how much the target's logit of ``expected`` exceeds that of ``got``; near 0 it is a rounding tie.
    """

    method: str
    workload: str
    prompt: int
    position: int
    expected: int | None
    got: int | None
    margin: float | None

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", logit margin {self.margin:.2g}"
        return (
            f"{self.method} on {self.workload} (prompt {self.prompt}): token {self.position} is {self.got}, "
            f"plain generate has {self.expected}{margin}"
        )


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first position at which two token lists differ, the end of one included; None when they are equal."""
    for position, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


@torch.no_grad()
def logit_margin(model: Any, ids: Sequence[int], expected: int | None, got: int | None) -> float | None:
    """The target's logit of one token after ``ids`` less that of the other; None where a token is missing."""
    if expected is None or got is None:
        return None
    logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
    return float(logits[expected] - logits[got])


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """The 95% interval of the median of ``values``, by resampling; the same seed gives the same.

    nan for fewer than two values, which tell nothing of their spread.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(np.asarray(values, np.float64)[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)
