"""What a step costs: the target's pass by its size, and everything beside the pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from specdec.attach import attach
from specdec.bench.measure import measure
from specdec.bench.methods import ours
from specdec.bench.quicker import Kernels
from specdec.bench.run import Ask

SIZES = (1, 2, 4, 8, 16, 32, 64)  # nodes of a pass, the root included
DRAFTER, NODES = "recycling", 64


def pass_cost(model: Any, kernels: Kernels, context: int) -> list[dict[str, Any]]:
    """T(N) behind a text of so many tokens, as policies know it, with the model's own layers and with our CPU kernels.

    It was timed when the model was first attached, up to 32 nodes, and has been moved by every pass since; beyond, a
    straight line goes on. Nothing for a model that takes no drafts.
    """
    costs = []
    for quick in (False, True):
        with kernels.inside() if quick else nullcontext():
            found = attach(model).costs
        if found is not None:
            times = found.times(max(SIZES), context)
            seconds = {str(n): round(float(times[n - 1]), 6) for n in SIZES}
            costs.append({"kernels": quick, "context": context, "seconds": seconds})
    return costs


def overhead(model: Any, asks: Sequence[Ask], max_new_tokens: int) -> dict[str, Any]:
    """Seconds of a step outside the target's pass over seconds in it, with token recycling at 64 nodes."""
    method = ours(copy.copy(model), f"{DRAFTER}@fixed:{NODES}")
    measure(method, asks[0].ids, max_new_tokens)
    decode, parts = 0.0, dict.fromkeys(("draft", "walk", "cache"), 0.0)
    passes: list[float] = []
    for ask in asks:
        with _pass_times(model) as times:
            run = measure(method, ask.ids, max_new_tokens)
        assert run.counted is not None, "ours count"
        decode, passes = decode + run.decode, passes + times[1:]  # the first is the prompt's
        parts = {part: seconds + run.counted["seconds"][part] for part, seconds in parts.items()}
    inside, steps = sum(passes), max(len(passes), 1)
    return {
        "drafter": DRAFTER,
        "nodes": NODES,
        "steps": len(passes),
        "pass_ms": round(1e3 * inside / steps, 3),
        "outside_ms": round(1e3 * (decode - inside) / steps, 3),
        "ratio": round((decode - inside) / inside, 4) if inside else 0.0,
        **{f"{part}_ms": round(1e3 * seconds / steps, 3) for part, seconds in parts.items()},
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
