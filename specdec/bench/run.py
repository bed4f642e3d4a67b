"""Methods compared with plain ``generate`` on the same prompts: tokens first, then times where they are equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.bench.difference import Difference, first_difference, logit_margin
from specdec.bench.disturbance import Disturbance, Probe
from specdec.bench.interval import errors, noise
from specdec.bench.measure import Run, measure
from specdec.bench.methods import Method, RivalError, prepare
from specdec.bench.quicker import Kernels
from specdec.bench.runfile import RunFile
from specdec.bench.workloads import Prompt, encode, unroll

BASELINE = "plain"
WARM_PROMPT, WARM_TOKENS = 48, 16  # of the first prompt, said twice so that there is something to guess
ALL = "all"


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt as token ids, the kind of work it belongs to, and its last message as text."""

    workload: str
    ids: list[int]
    text: str = ""


Tell = Callable[[int, Ask, str, Run | None], None]  # repeat, prompt, method; before a run None, after it what came


def encode_all(model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Ask]:
    """Every user turn of every prompt as token ids, earlier turns answered by the model itself."""
    plain = prepare(model, BASELINE)

    def answer(prompt: Prompt) -> str:
        tokens = measure(plain, encode(tokenizer, prompt), max_new_tokens).tokens
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    flat = unroll(prompts, answer)
    return [Ask(prompt.workload, encode(tokenizer, prompt), prompt.messages[-1]["content"]) for prompt in flat]


@dataclass(slots=True)
class Comparison:
    """What some methods did with some prompts.

    Attributes:
        model: the unwrapped target.
        asks: the prompts.
        names: the methods, plain ``generate`` first.
        max_new_tokens: at most that many tokens per prompt.
        disturbance: looks at the machine between measurements; None to look away.
        file: keeps finished runs; those it holds from before an interrupt are not measured again.
        runs: by (method, prompt), in order of repeats.
        differences: where methods' tokens were others.
        unavailable: rivals that do not run here, and why.
        kernels: our CPU kernels for the model.
    """

    model: Any
    asks: Sequence[Ask]
    names: Sequence[str]
    max_new_tokens: int
    disturbance: Disturbance | None = None
    file: RunFile | None = None
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    kernels: Kernels = field(init=False)
    _warm: bool = False

    def __post_init__(self) -> None:
        self.kernels = Kernels(self.model)
        self.names = (BASELINE, *(name for name in self.names if name != BASELINE))
        if self.file is None:
            return
        for name, prompt, run in self.file.runs():
            self.runs.setdefault((name, prompt), []).append(run)
        self.unavailable |= {r["method"]: r["reason"] for r in self.file.of("unavailable")}
        if self.disturbance is not None:
            self.disturbance.probes += [Probe(**r) for r in self.file.of("probe")]

    def run(
        self,
        repeats: int = 1,
        width: float = 0.0,
        seconds: float = math.inf,
        tell: Tell = lambda *_: None,
        names: Collection[str] | None = None,
    ) -> None:
        """Measure until intervals are narrow, or the time or the number of repeats is used up.

        The first repeat is the test of equality too, and always done whole. Methods take turns on each prompt, in an
        order that rotates, so that a busy or hot machine touches all alike. Each repeat starts with empty drafter
        memories and carries them from prompt to prompt: as in use, and never having seen the prompt before. A repeat
        that goes on after an interrupt has memories of what came since.

        Args:
            repeats: at most.
            width: as a share of each speedup, by workload and over all, how wide what measuring alone adds may be.
            seconds: of measuring, after which no prompt is begun again.
            tell: hears of each run before and after it.
            names: the methods to run; None for all.
        """
        asked = [name for name in self.names if names is None or name in names]
        for repeat in range(repeats):
            if repeat and self.widest() <= width:
                break
            methods: list[Method] = []
            for prompt in range(len(self.asks)):
                if any(self._due(name, prompt, repeat) for name in asked):
                    if repeat and self.spent >= seconds:
                        return
                    methods = methods or self._methods(asked)
                    self._turn(methods, prompt, repeat, tell)
                self._compare(prompt, repeat)

    def equal(self, name: str, workload: str) -> bool:
        """Whether a method ran, and its tokens and plain ``generate``'s own were the reference's each time."""
        return name not in self.unavailable and not any(
            d.method in (name, BASELINE) and workload in (ALL, d.workload) for d in self.differences
        )

    def reference(self, prompt: int) -> list[int]:
        """Plain ``generate``'s tokens."""
        return self.runs[BASELINE, prompt][0].tokens

    @property
    def groups(self) -> list[str]:
        """The workloads, and "all"."""
        return [*dict.fromkeys(ask.workload for ask in self.asks), ALL]

    def prompts(self, workload: str) -> list[int]:
        """The prompts of a workload."""
        return [i for i, ask in enumerate(self.asks) if workload in (ALL, ask.workload)]

    def ratios(self, name: str, baseline: str, prompts: Sequence[int]) -> list[list[float]]:
        """Each prompt's speedups of decoding, one from each repeat: both ran within the same minute.

        Prompts whose tokens all came at once, with the prompt's pass, have none.
        """
        return [
            [(b.decode / b.decoded) / (a.decode / a.decoded) for a, b in zip(ours, base, strict=False)]
            for ours, base in ((self.runs[name, i], self.runs[baseline, i]) for i in prompts)
            if ours[0].decoded and base[0].decoded
        ]

    @property
    def spent(self) -> float:
        """Seconds of all runs."""
        return sum(run.total for runs in self.runs.values() for run in runs)

    def widest(self) -> float:
        """The widest of all speedups' intervals that comes of measuring alone, as a share of the speedup."""
        return max((self._width(name, group) for name in self.names[1:] for group in self.groups), default=0.0)

    def _width(self, name: str, workload: str) -> float:
        """A repeat's errors are the machine's, so those on all kinds of work tell what they are on each."""
        kinds = [kind for kind in self.groups[:-1] if self.equal(name, kind)]
        if not self.equal(name, workload):
            return 0.0
        every = [i for kind in kinds for i in self.prompts(kind)]
        ratios = self.ratios(name, BASELINE, self.prompts(workload))
        return noise(ratios, errors(self.ratios(name, BASELINE, every))) if ratios else 0.0

    def _due(self, name: str, prompt: int, repeat: int) -> bool:
        """Whether a method is still to be run; one that failed on a workload has no more to show there."""
        if name in self.unavailable or len(self.runs.get((name, prompt), [])) > repeat:
            return False
        return repeat == 0 or self.equal(name, self.asks[prompt].workload)

    def _methods(self, names: Sequence[str]) -> list[Method]:
        """Methods, warm, their memory empty but for a few tokens."""
        methods = [method for name in names if (method := self._method(name))]
        self._warm = True
        return methods

    def _method(self, name: str) -> Method | None:
        """None for a rival that does not run here."""
        if name in self.unavailable:
            return None
        ids = self.asks[0].ids
        try:
            method = prepare(self.model, name, self.kernels)
            if not self._warm:  # once, as code that is compiled or loaded at its first use stays
                measure(method, ids[:WARM_PROMPT] * 2, WARM_TOKENS)
                method = method if method.counts is None else prepare(self.model, name, self.kernels)
            measure(method, ids[:8], 2)
        except RivalError as error:
            self._leave_out(name, str(error))
            return None
        return method

    def _leave_out(self, name: str, reason: str) -> None:
        self.unavailable[name] = reason
        if self.file is not None:
            self.file.write("unavailable", method=name, reason=reason)

    def _turn(self, methods: Sequence[Method], prompt: int, repeat: int, tell: Tell) -> None:
        """Run on one prompt all methods that are due, in this prompt's order."""
        first = (prompt + repeat) % len(methods)
        if self.disturbance is not None:
            self.disturbance.begin()
        for method in (*methods[first:], *methods[:first]):
            if self._due(method.name, prompt, repeat):
                tell(repeat, self.asks[prompt], method.name, None)
                run = self._measured(method, prompt)
                tell(repeat, self.asks[prompt], method.name, run)
        if self.disturbance is not None:
            probe = self.disturbance.end()
            if self.file is not None:
                self.file.write("probe", **probe._asdict())

    def _measured(self, method: Method, prompt: int) -> Run | None:
        """One run, kept. None for a rival that fails."""
        try:
            run = measure(method, self.asks[prompt].ids, self.max_new_tokens)
        except RivalError as error:
            self._leave_out(method.name, f"on {self.asks[prompt].workload} (prompt {prompt}): {error}")
            return None
        self.runs.setdefault((method.name, prompt), []).append(run)
        if self.file is not None:
            self.file.write_run(method.name, prompt, run)
        return run

    def _compare(self, prompt: int, repeat: int) -> None:
        """Note whose tokens in this repeat are not those of plain ``generate``'s first run."""
        ask, expected = self.asks[prompt], self.reference(prompt)
        for name in self.names:
            tokens = next((run.tokens for run in self.runs.get((name, prompt), [])[repeat : repeat + 1]), expected)
            if (at := first_difference(expected, tokens)) is not None:
                a, b = (each[at] if at < len(each) else None for each in (expected, tokens))
                margin, tie = logit_margin(self.model, ask.ids + expected[:at], a, b)
                difference = Difference(name, ask.workload, prompt, at, a, b, margin, tie)
                if difference not in self.differences:
                    self.differences.append(difference)
