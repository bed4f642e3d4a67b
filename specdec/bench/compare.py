"""A whole comparison, from prompts to the report: what ``specdec bench`` does, as functions."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.disturbance import Disturbance
from specdec.bench.machine import machine, weights
from specdec.bench.measure import measure
from specdec.bench.methods import KERNELS, is_ours, known, ours
from specdec.bench.parts import source
from specdec.bench.report import Record, report
from specdec.bench.run import Ask, Comparison, encode_all
from specdec.bench.runfile import RunFile
from specdec.bench.steps import overhead, pass_cost
from specdec.bench.workloads import Prompt, first_of_each
from specdec.recorder import Recorder

BESIDE = 3  # prompts on which the cost of a step is measured
BEHIND = 256  # tokens, where T(N) is told


def begin(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    methods: Sequence[str],
    max_new_tokens: int = 128,
    *,
    name: str = "",
    runs: Path | None = None,
    fresh: bool = False,
) -> Comparison:
    """A comparison ready to ``run``.

    Args:
        model: a transformers causal language model, not wrapped.
        methods: names, see ``specdec.bench.methods``; plain ``generate`` is always among them.
        name: of the model, for the report.
        runs: a file that keeps finished runs; where it holds unfinished ones of this very comparison they count.
        fresh: whether to begin anew whatever that file holds.

    Raises:
        ValueError: there is no such method, or the file holds unfinished runs of another comparison.
        OSError: the file cannot be read or written.
    """
    names = [known(each) for each in methods]
    file = None
    if runs is not None:
        asked = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
        settings = {"max_new_tokens": max_new_tokens, "methods": names, "prompts": asked, "code": source(names)}
        file = RunFile(runs, {**machine(model, name), "weights": weights(model), **settings}, fresh)
    asks = [Ask(**ask) for record in file.of("prompts") for ask in record["asks"]] if file else []
    if not asks:
        asks = encode_all(model, tokenizer, prompts, max_new_tokens)
        if file:
            file.write("prompts", asks=[asdict(ask) for ask in asks])
    return Comparison(model, asks, names, max_new_tokens, Disturbance(), file)


def finish(comparison: Comparison, tokenizer: Any, name: str = "", allow_disturbed: bool = False) -> Record:
    """The report of a comparison that has run, and what a step costs, which is measured now."""
    made = report(comparison, name, tokenizer, allow_disturbed)
    if made["disturbance"]["refused"]:
        return made | {"overhead": None, "pass_cost": []}
    asks = first_of_each(comparison.asks, 1)[:BESIDE]
    beside = overhead(comparison.model, asks, comparison.max_new_tokens)
    return made | {"overhead": beside, "pass_cost": pass_cost(comparison.model, comparison.kernels, BEHIND)}


def record(comparison: Comparison, results: Sequence[Record], tokenizer: Any, path: Path) -> None:
    """Trace the quickest method of ours on the first prompt of each workload, untimed, to a new file.

    Raises:
        ValueError: no method of ours had plain ``generate``'s tokens.
        OSError: the file cannot be written.
    """
    speeds = {r["method"]: r["speedup"] or 0.0 for r in results if is_ours(r["method"]) and r["equal"]}
    if not speeds:
        raise ValueError("nothing to trace: no method of ours has plain generate's tokens")
    name = max(speeds, key=lambda each: speeds[each])
    path.unlink(missing_ok=True)
    recorder = Recorder(path, tokenizer=tokenizer)
    kernels = comparison.kernels if name.endswith(KERNELS) else None
    method = ours(copy.copy(comparison.model), name, kernels, recorder)
    for ask in first_of_each(comparison.asks, 1):
        recorder.label = f"{ask.workload}/0 {name}"
        measure(method, ask.ids, comparison.max_new_tokens)
