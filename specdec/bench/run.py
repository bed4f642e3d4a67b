"""Methods compared with plain ``generate`` on the same prompts: first for equality, then, where equal, for speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.bench.measure import Difference, Run, first_difference, logit_margin, measure
from specdec.bench.methods import Method, RivalError, prepare
from specdec.bench.workloads import Prompt, encode, unroll

BASELINE = "plain"


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt as token ids, and the kind of work it belongs to."""

    workload: str
    ids: list[int]


def encode_all(model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Ask]:
    """Every user turn of every prompt as token ids, earlier turns answered by the model itself."""
    plain = prepare(model, BASELINE)

    def answer(prompt: Prompt) -> str:
        tokens = measure(plain, encode(tokenizer, prompt), max_new_tokens).tokens
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return [Ask(prompt.workload, encode(tokenizer, prompt)) for prompt in unroll(prompts, answer)]


@dataclass(slots=True)
class Comparison:
    """What some methods did with some prompts.

    Attributes:
        model: the unwrapped target.
        asks: the prompts.
        names: the methods, plain ``generate`` first.
        max_new_tokens: at most that many tokens per prompt.
        references: plain ``generate``'s tokens for each prompt, once ``check`` has run.
        differences: where methods' tokens were others.
        runs: timed runs by (method, prompt).
        unavailable: rivals that do not run here, and why.
    """

    model: Any
    asks: Sequence[Ask]
    names: Sequence[str]
    max_new_tokens: int
    references: list[list[int]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = (BASELINE, *(name for name in self.names if name != BASELINE))

    def check(self, tick: Callable[[], None] = lambda: None) -> None:
        """Run every method on every prompt once, untimed; note where tokens differ. Also the warm-up of all code."""
        methods = self._methods()
        for prompt in range(len(self.asks)):
            for method in methods:
                self._run(method, prompt)
                tick()

    def time(self, repeats: int, tick: Callable[[], None] = lambda: None) -> None:
        """Run every method ``repeats`` times on the prompts of the workloads where its tokens are equal.

        Methods take turns on each prompt, in a rotating order, so that a busy or hot machine touches all alike. Each
        repeat starts with empty drafter memories and carries them from prompt to prompt: as in use, and never
        having seen the prompt before.
        """
        for _ in range(repeats):
            methods = self._methods()
            for prompt in range(len(self.asks)):
                turn = prompt % len(methods)
                for method in methods[turn:] + methods[:turn]:
                    self._time(method, prompt)
                    tick()

    def equal(self, name: str, workload: str) -> bool:
        """Whether a method ran, and its tokens and plain ``generate``'s own were the reference's each time."""
        return name not in self.unavailable and not any(
            d.method in (name, BASELINE) and d.workload == workload for d in self.differences
        )

    def _methods(self) -> list[Method]:
        """Every method with an empty memory, after a first short run that bears what happens only once."""
        return [method for name in self.names if (method := self._method(name))]

    def _method(self, name: str) -> Method | None:
        """None for a rival that does not run here."""
        if name in self.unavailable:
            return None
        try:
            method = prepare(self.model, name)
            measure(method, self.asks[0].ids[:8], 2)
        except RivalError as error:
            self.unavailable[name] = str(error)
            return None
        return method

    def _time(self, method: Method, prompt: int) -> None:
        if self.equal(method.name, self.asks[prompt].workload) and (run := self._run(method, prompt)):
            self.runs.setdefault((method.name, prompt), []).append(run)

    def _run(self, method: Method, prompt: int) -> Run | None:
        """One run, its tokens compared with the reference; the first run of the baseline is the reference.

        None for a rival that fails, now or before.
        """
        ask = self.asks[prompt]
        if method.name in self.unavailable:
            return None
        try:
            run = measure(method, ask.ids, self.max_new_tokens)
        except RivalError as error:
            self.unavailable[method.name] = f"on {ask.workload} (prompt {prompt}): {error}"
            return None
        if prompt == len(self.references):
            self.references.append(run.tokens)
        expected = self.references[prompt]
        if (at := first_difference(expected, run.tokens)) is not None:
            a, b = (tokens[at] if at < len(tokens) else None for tokens in (expected, run.tokens))
            margin = logit_margin(self.model, ask.ids + expected[:at], a, b)
            self.differences.append(Difference(method.name, ask.workload, prompt, at, a, b, margin))
        return run
