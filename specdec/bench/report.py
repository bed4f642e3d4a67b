"""The figures of a comparison, the cost of a step beside the target's pass, and the machine they hold for."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import specdec
from specdec.bench.measure import Run, bootstrap, measure
from specdec.bench.methods import Method, prepare
from specdec.bench.run import BASELINE, Ask, Comparison
from specdec.policies import FixedPolicy

ALL = "all"


def results(comparison: Comparison, baseline: str = BASELINE) -> list[dict[str, Any]]:
    """One record per method and workload, and per method over all; no speed where any token differed.

    Speedups are over the method ``baseline``, and null where its tokens differed. Rivals that do not run are left out.
    """
    workloads = list(dict.fromkeys(ask.workload for ask in comparison.asks))
    groups = workloads if len(workloads) == 1 else [*workloads, ALL]
    names = [name for name in comparison.names if name not in comparison.unavailable]
    return [_result(comparison, name, baseline, workload) for workload in groups for name in names]


def _result(comparison: Comparison, name: str, baseline: str, workload: str) -> dict[str, Any]:
    prompts = [i for i, ask in enumerate(comparison.asks) if workload in (ALL, ask.workload)]
    kinds = {comparison.asks[i].workload for i in prompts}
    equal, comparable = (all(comparison.equal(each, kind) for kind in kinds) for each in (name, baseline))
    record = {
        "method": name,
        "workload": workload,
        "prompts": len(prompts),
        "tokens": sum(len(comparison.references[i]) for i in prompts),
        "equal": equal,
        "baseline": baseline,
    }
    return record | _figures(comparison, name, baseline, prompts if equal and comparable else [])


def _figures(comparison: Comparison, name: str, baseline: str, prompts: Sequence[int]) -> dict[str, float | None]:
    """Speeds are of decoding, the prompt's pass apart; times are medians over repeats, speedups over prompts."""
    runs = [comparison.runs[name, i] for i in prompts]
    others = [comparison.runs[baseline, i] for i in prompts]
    ratios = [_rate(ours) / _rate(base) for ours, base in zip(runs, others, strict=True)]
    totals = [_median(r.total for r in b) / _median(r.total for r in a) for a, b in zip(runs, others, strict=True)]
    every = [run for group in runs for run in group]
    low, high = bootstrap([ratio for ratio in ratios if not math.isnan(ratio)])
    figures = {
        "tokens_per_step": _ratio(sum(len(run.tokens) for run in every), sum(run.passes for run in every)),
        "tokens_per_second": _ratio(
            sum(group[0].decoded for group in runs), sum(_median(run.decode for run in group) for group in runs)
        ),
        "speedup": _median(ratios),
        "speedup_low": low,
        "speedup_high": high,
        "speedup_with_prefill": _median(totals),
        "prefill_seconds": _median(run.prefill for run in every),
    }
    return {key: None if math.isnan(value) else round(value, 4) for key, value in figures.items()}


def _rate(runs: Sequence[Run]) -> float:
    """Tokens per second of one prompt's repeats; nan where all tokens came first."""
    return _ratio(runs[0].decoded, _median(run.decode for run in runs)) or math.nan


def _median(values: Iterable[float]) -> float:
    """The median of those that are numbers; nan for none, which the records write as null."""
    return statistics.median([value for value in values if not math.isnan(value)] or [math.nan])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def overhead(model: Any, asks: Sequence[Ask], max_new_tokens: int) -> dict[str, Any]:
    """Seconds of a step outside the target's pass over seconds in it, with token recycling at 64 nodes."""
    view = prepare(model, BASELINE).model
    wrapped = specdec.wrap(view, drafter="recycling", policy=FixedPolicy(64, 8, 8), cpu_kernels=False)
    method = Method("recycling", wrapped, wrapped=True)
    measure(method, asks[0].ids, max_new_tokens)
    specdec.stats(wrapped).reset()
    decode, passes = 0.0, []
    for ask in asks:
        with _pass_times(model) as times:
            decode += measure(method, ask.ids, max_new_tokens).decode
        passes += times[1:]  # the first is the prompt's
    inside, parts = sum(passes), specdec.stats(wrapped).seconds
    steps = max(len(passes), 1)
    return {
        "drafter": "recycling",
        "nodes": 64,
        "steps": len(passes),
        "pass_ms": round(1e3 * inside / steps, 3),
        "outside_ms": round(1e3 * (decode - inside) / steps, 3),
        "ratio": round(_ratio(decode - inside, inside), 4),
        **{f"{part}_ms": round(1e3 * parts[part] / steps, 3) for part in ("draft", "walk", "cache")},
    }


@contextmanager
def _pass_times(model: Any) -> Iterator[list[float]]:
    """Collect the seconds of each of the model's passes, waiting for the device at both ends."""
    times: list[float] = []

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    hooks = (
        model.register_forward_pre_hook(lambda *_: times.append(-now())),
        model.register_forward_hook(lambda *_: times.append(times.pop() + now())),
    )
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def machine(model: Any, name: str) -> dict[str, Any]:
    """What the figures hold for: hardware, versions, threads, model and number format."""
    cuda = model.device.type == "cuda"
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(model.device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specdec": specdec.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
