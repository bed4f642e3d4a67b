"""The figures of a comparison, ready for JSON. docs/metrics.md says what each of them means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from specdec.bench.counts import added, by_depth, conditional
from specdec.bench.disturbance import Disturbance
from specdec.bench.interval import interval
from specdec.bench.loops import loops
from specdec.bench.machine import machine
from specdec.bench.methods import is_ours
from specdec.bench.run import BASELINE, Comparison

VERSION = 2
AGAINST = ("plain+kernels", "compiled")  # what speeds are also taken over, besides plain generate
TIMED = (
    "tokens_per_second",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_with_prefill",
    "prefill_seconds",
    "speedup_without_loops",
)
SHOWN = 300  # characters of a question
Record = dict[str, Any]


def report(comparison: Comparison, name: str, tokenizer: Any, allow_disturbed: bool = False) -> Record:
    """Everything there is to say of a comparison, but what a step costs.

    Args:
        name: of the model.
        tokenizer: to write outputs as text.
        allow_disturbed: whether to tell speeds that other load has disturbed.
    """
    ran = set(comparison.names) - set(comparison.unavailable)
    watch = comparison.disturbance or Disturbance()
    made: Record = {
        "version": VERSION,
        "machine": machine(comparison.model, name),
        "max_new_tokens": comparison.max_new_tokens,
        "repeats": max(map(len, comparison.runs.values())),
        "results": results(comparison),
        "against": [r for other in AGAINST if other in ran for r in results(comparison, other)],
        "parts": parts(comparison),
        "differences": [{**asdict(d), "text": str(d)} for d in comparison.differences],
        "disturbance": watch.report(allow_disturbed),
        "unavailable": comparison.unavailable,
        "questions": [{"workload": ask.workload, "prompt": ask.text[:SHOWN]} for ask in comparison.asks],
        "outputs": [tokenizer.decode(comparison.reference(i)) for i in range(len(comparison.asks))],
    }
    return withheld(made) if made["disturbance"]["refused"] else made


def withheld(report: Record) -> Record:
    """The report without any speed: counts and equality are not disturbed by other load."""
    timeless = dict.fromkeys(TIMED)
    return report | {
        "results": [r | timeless for r in report["results"]],
        "against": [r | timeless for r in report["against"]],
        "parts": [r | {"seconds": dict.fromkeys(r["seconds"])} for r in report["parts"]],
    }


def results(comparison: Comparison, baseline: str = BASELINE) -> list[Record]:
    """One record per method and workload, and per method over all; no speed where any token differed.

    Speedups are over the method ``baseline``, and null where its tokens differed. Rivals that do not run are left out.
    """
    names = [name for name in comparison.names if name not in comparison.unavailable]
    return [_result(comparison, name, baseline, workload) for workload in comparison.groups for name in names]


def _result(comparison: Comparison, name: str, baseline: str, workload: str) -> Record:
    prompts = comparison.prompts(workload)
    equal, comparable = (comparison.equal(each, workload) for each in (name, baseline))
    looping = [i for i in prompts if loops(comparison.reference(i))]
    record = {
        "method": name,
        "workload": workload,
        "prompts": len(prompts),
        "tokens": sum(len(comparison.reference(i)) for i in prompts),
        "equal": equal,
        "baseline": baseline,
        "loops": len(looping),
    }
    shown = prompts if equal and comparable else []
    straight = comparison.ratios(name, baseline, [i for i in shown if i not in looping])
    figures = _figures(comparison, name, baseline, shown) | {"speedup_without_loops": _middle(straight)}
    return record | {key: None if math.isnan(value) else round(value, 4) for key, value in figures.items()}


def _figures(comparison: Comparison, name: str, baseline: str, prompts: Sequence[int]) -> dict[str, float]:
    """Speeds are of decoding, the prompt's pass apart; times are medians over repeats, speedups over prompts."""
    runs = [comparison.runs[name, i] for i in prompts]
    others = [comparison.runs[baseline, i] for i in prompts]
    totals = [[b.total / a.total for a, b in zip(*each, strict=False)] for each in zip(runs, others, strict=True)]
    ratios = comparison.ratios(name, baseline, prompts)
    every = [run for group in runs for run in group]
    low, high = interval(ratios)
    return {
        "tokens_per_step": _ratio(sum(len(run.tokens) for run in every), sum(run.passes for run in every)),
        "tokens_per_second": _ratio(
            sum(group[0].decoded for group in runs), sum(_median(run.decode for run in group) for group in runs)
        ),
        "speedup": _middle(ratios),
        "speedup_low": low,
        "speedup_high": high,
        "speedup_with_prefill": _middle(totals),
        "prefill_seconds": _median(run.prefill for run in every),
    }


def _middle(prompts: Iterable[Iterable[float]]) -> float:
    """The median over prompts of the median over each one's repeats."""
    return _median(map(_median, prompts))


def _median(values: Iterable[float]) -> float:
    """nan for none, which the records write as null."""
    return statistics.median([*values] or [math.nan])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def parts(comparison: Comparison) -> list[Record]:
    """Where the time went and what became of guesses: one record per method of ours and workload, where equal."""
    names = [name for name in comparison.names if is_ours(name)]
    return [
        _parts(comparison, name, workload)
        for workload in comparison.groups
        for name in names
        if comparison.equal(name, workload)
    ]


def _parts(comparison: Comparison, name: str, workload: str) -> Record:
    runs = [run for i in comparison.prompts(workload) for run in comparison.runs[name, i]]
    total = added(run.counted for run in runs if run.counted)
    seconds = total["seconds"]
    seconds["other"] = max(0.0, sum(run.total for run in runs) - sum(seconds.values()))
    return {
        "method": name,
        "workload": workload,
        **{key: total[key] for key in ("steps", "tokens", "drafted", "accepted")},
        "seconds": {part: round(spent, 6) for part, spent in seconds.items()},
        "accepted_lengths": total["accepted_lengths"],
        "acceptance_by_depth": by_depth(total),
        "conditional_acceptance": conditional(total),
        "sizes": total["sizes"],
        "by_drafter": total["by_drafter"],
    }
