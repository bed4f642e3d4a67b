"""A model's costs: those saved on this machine, or else measured in less than a second where passes are quick."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from specdec.cache import SlotCache
from specdec.core import DraftTree
from specdec.costs import VERSION, Costs
from specdec.demo import cache_directory
from specdec.model import Model

SIZES = (1, 2, 4, 8, 16, 32)
ROUNDS = 3  # of timing each size, if time allows
TIMING_SECONDS = 0.6  # for timing passes of all sizes; the last of them may take longer
WORTH_SAVING = 0.02  # seconds of a pass over 32 nodes; quicker models are timed anew in each process
LONG = 1024  # tokens of the made-up text behind which attention is timed
MOST_BYTES = 256 << 20  # of its keys and values
MOST_SECONDS = 0.25  # of a pass that is timed behind it
FEW, MANY = 1, 16  # nodes of the passes that tell how attention grows


def costs_of(model: Model) -> tuple[Costs, str]:
    """The costs of passes of a model, and why saved ones were not used: empty where there were none, or all was well.

    ``model`` is one that has just started, and is of no use for decoding afterwards.
    """
    path, reason = saved_at(model), ""
    try:
        return Costs.load(path), ""
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = f"pass times are measured anew: {error}"
    costs = measure(model)
    if costs.times(32, 0)[-1] > WORTH_SAVING:
        try:
            costs.save(path)
        except OSError as error:
            reason = reason or f"pass times cannot be saved: {error}"
    return costs, reason


def measure(model: Model) -> Costs:
    """Time passes by size, and what a long text adds to them."""
    end = time.perf_counter() + TIMING_SECONDS
    seconds: dict[int, float] = {}
    # The quickest counts: whatever disturbs a pass makes it slower, and seldom several far apart.
    for size in ROUNDS * SIZES:
        if time.perf_counter() < end or len(seconds) < 2:
            seconds[size] = min(_timed(model, size), seconds.get(size, torch.inf))
    soon = 2 * (1 + ROUNDS) * seconds[1] < TIMING_SECONDS  # else the user would wait for it
    spare = _spare(model) if soon else 0.0
    return Costs(seconds, *_growth(model, seconds), spare)


def _spare(model: Model) -> float:
    """How much longer the model's own step takes, with the cache of plain ``generate``; 0 where that is another one."""
    if not isinstance(model.cache, SlotCache):
        return 0.0
    token, cache = torch.ones(1, 1, dtype=torch.long, device=model.module.device), DynamicCache(config=model.config)
    ours, own = list[float](), list[float]()
    try:
        for _ in range(1 + ROUNDS):  # in turns: machines are quicker now and slower then
            ours.append(_timed(model, 1))
            start = time.perf_counter()
            model.module(token, past_key_values=cache, use_cache=True).logits[0, -1, 0].item()
            own.append(time.perf_counter() - start)
    except Exception:  # what a model makes of a made-up text is no reason to think ill of it
        return 0.0
    return max(0.0, min(own[1:]) / min(ours[1:]) - 1)


def _growth(model: Model, seconds: dict[int, float]) -> tuple[float, float]:
    """What a token of the text adds to a pass: to read it, and for each node to attend to it."""
    try:
        if seconds.get(MANY, torch.inf) > MOST_SECONDS or not _lengthen(model):
            return 0.0, 0.0
        few, many = (max(0.0, _timed(model, size) - seconds[size]) / LONG for size in (FEW, MANY))
    except Exception:  # what a model makes of a made-up text is no reason to think ill of it
        return 0.0, 0.0
    attend = max(0.0, many - few) / (MANY - FEW)
    return max(0.0, few - FEW * attend), attend


def _timed(model: Model, size: int) -> float:
    tree = DraftTree.chain(1, [1] * (size - 1), [1.0] * (size - 1), "")
    start = time.perf_counter()
    logits = model.forward([tree]).logits
    logits[0, -1, 0].item()  # waits for the device
    seconds = time.perf_counter() - start
    model.keep([[0]])
    return seconds


def _lengthen(model: Model) -> bool:
    """Make believe that the text is ``LONG``; whether that can be done."""
    if not isinstance(model.cache, SlotCache) or len(model.lengths) > 1:
        return False
    layers = [layer for layer in model.cache.slots if layer.is_initialized]
    per_token = sum((layer.keys.nbytes + layer.values.nbytes) / layer.keys.shape[2] for layer in layers)
    if per_token * LONG > MOST_BYTES or getattr(model.config, "max_position_embeddings", 0) < 2 * LONG:
        return False
    for layer in layers:
        held = min(LONG, layer.window or LONG)
        keys, values = (old.new_zeros((*old.shape[:2], held, old.shape[3])) for old in (layer.keys, layer.values))
        layer.adopt(keys, values, LONG)
    model.lengths = [LONG]
    return True


def saved_at(model: Model) -> Path:
    """The file for models like this one, on this machine, with these threads, kernels and versions."""
    parameters = [(name, str(p.dtype), list(p.shape), str(p.device)) for name, p in model.module.named_parameters()]
    # Layers of ours, of PEFT or quantised ones show in their types, or in a forward of their own.
    layers = [(type(m).__name__, type(vars(m).get("forward")).__name__) for m in model.module.modules()]
    machine = (platform.node(), platform.machine(), os.cpu_count(), _devices(), torch.get_num_threads())
    attention = getattr(model.config, "_attn_implementation", None)
    facts = (VERSION, torch.__version__, machine, attention, repr(model.form), parameters, layers)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return cache_directory() / "costs" / f"{type(model.module).__name__}-{digest}.safetensors"


def _devices() -> list[Any]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
