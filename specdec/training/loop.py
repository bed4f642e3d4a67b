"""The training loop of every kind of drafter: steps, checkpoints, and a figure that says how it drafts as it goes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from specdec import storage

KIND, VERSION = "training", 1
WARM_UP, LOWEST = 0.05, 0.05  # shares of the whole run, and of the learning rate
CLIP = 1.0  # of the gradient's norm
DECAY, BETAS = 0.01, (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")

Batch = TypeVar("Batch")


@dataclass(slots=True)
class State:
    """How far a run has come.

    Attributes:
        step: steps done.
        seconds: wall time they took, validation among it.
        figures: at each check: step, seconds, mean loss since the last, and what validation said, or None.
    """

    step: int = 0
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)


def train(
    module: nn.Module,
    batches: Callable[[int], Batch],
    loss: Callable[[Batch], Tensor],
    folder: Path,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    minutes: float = math.inf,
    validate: Callable[[], float] | None = None,
    every: int = 100,
    figure_name: str = "tokens per step",
) -> State:
    """Fit what a module lets be trained: AdamW, a warm-up and then a cosine, gradients clipped by their norm.

    A checkpoint is put into ``folder`` every so many steps, and at the end. The same call goes on from it; with
    ``steps`` as the only limit, on the CPU, to the same weights, bit for bit, as if it had not been stopped.

    Args:
        module: its parameters that require a gradient are changed in place; they must be float32.
        batches: of a step's number, from 0 on, what its loss is taken of; the same at every call.
        loss: a scalar; may draw from torch's random state, which starts from ``seed`` and is part of a checkpoint.
        steps: to take at most.
        minutes: of wall time to take at most, over all calls; the cosine ends with whichever limit comes first.
        validate: a figure of merit, told beside the loss; called every so many steps, in evaluation mode.
        every: steps between checkpoints.
        figure_name: what ``validate`` tells.

    Raises:
        ValueError: for a parameter that is not float32, or a folder with a checkpoint of another run.
    """
    learnt = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    if wrong := [name for name, weight in learnt.items() if weight.dtype != torch.float32]:
        raise ValueError(f"parameter {wrong[0]} is {learnt[wrong[0]].dtype}: training needs float32")
    optimizer = torch.optim.AdamW(learnt.values(), learning_rate, BETAS, weight_decay=DECAY)
    asked = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "minutes": str(minutes), "every": every}
    file = folder / "checkpoint.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    state = _resume(file, asked, learnt, optimizer) if file.exists() else State()
    begun, losses = time.perf_counter() - state.seconds, list[float]()
    share = max(state.step / steps, state.seconds / 60 / minutes)
    with _bar() as bar:
        task = bar.add_task("training", total=1.0, loss=math.nan, figure="")
        bar.update(task, completed=share)
        while share < 1:
            module.train()
            optimizer.param_groups[0]["lr"] = learning_rate * _height(share)
            losses.append(_step(optimizer, learnt, loss(batches(state.step))))
            state.step, state.seconds = state.step + 1, time.perf_counter() - begun
            share = max(state.step / steps, state.seconds / 60 / minutes)
            if state.step % every == 0 or share >= 1:
                figure = None if validate is None else _validated(module, validate)
                mean, losses = sum(losses) / len(losses), []
                state.seconds = time.perf_counter() - begun
                state.figures.append({"step": state.step, "seconds": state.seconds, "loss": mean, "figure": figure})
                _save(file, asked, state, learnt, optimizer)
                told = "" if figure is None else f"{figure:.3f} {figure_name}"
                bar.update(task, loss=mean, figure=told)
                bar.console.print(f"step {state.step}, {state.seconds:.0f} s: loss {mean:.4f} {told}", highlight=False)
            bar.update(task, completed=share)
    module.eval()
    return state


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%")
    told = TextColumn("loss {task.fields[loss]:.4f} {task.fields[figure]}"), TimeElapsedColumn()
    return Progress(*columns, *told, console=Console(stderr=True), transient=True)


def _height(share: float) -> float:
    """The learning rate at some share of the run, as a share of its highest."""
    if share < WARM_UP:
        return (share + 0.01) / (WARM_UP + 0.01)  # the first step is to learn something too
    done = (share - WARM_UP) / (1 - WARM_UP)
    return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2


def _step(optimizer: torch.optim.Optimizer, learnt: Mapping[str, nn.Parameter], loss: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(learnt.values(), CLIP)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _validated(module: nn.Module, validate: Callable[[], float]) -> float:
    module.eval()
    devices = {weight.device for weight in module.parameters() if weight.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        return validate()


def _save(
    file: Path,
    asked: dict[str, Any],
    state: State,
    learnt: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    arrays = {f"weight.{name}": _array(weight.detach()) for name, weight in learnt.items()}
    for moment in MOMENTS:
        arrays |= {f"{moment}.{name}": _array(optimizer.state[weight][moment]) for name, weight in learnt.items()}
    arrays["random"] = _array(torch.get_rng_state())
    if device := _cuda(learnt):
        arrays["random.cuda"] = _array(torch.cuda.get_rng_state(device))
    storage.write(file, KIND, VERSION, arrays, {"asked": asked, "state": asdict(state)})


def _resume(
    file: Path, asked: dict[str, Any], learnt: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> State:
    """Put a checkpoint's weights, moments and random state where they were."""
    arrays, facts = storage.read(file, KIND, VERSION)
    shapes = {name: list(arrays[f"weight.{name}"].shape) for name in learnt if f"weight.{name}" in arrays}
    if facts["asked"] != asked or shapes != {name: list(weight.shape) for name, weight in learnt.items()}:
        raise ValueError(f"{file} is of another run, asked for with {json.dumps(facts['asked'])}: give another folder")
    with torch.no_grad():
        for name, weight in learnt.items():
            weight.copy_(torch.from_numpy(arrays[f"weight.{name}"]))
            moments = {each: torch.from_numpy(arrays[f"{each}.{name}"]).to(weight.device) for each in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(facts["state"]["step"])), **moments}
    torch.set_rng_state(torch.from_numpy(arrays["random"]))
    if device := _cuda(learnt):
        torch.cuda.set_rng_state(torch.from_numpy(arrays["random.cuda"]), device)
    return State(**facts["state"])


def _cuda(learnt: Mapping[str, nn.Parameter]) -> torch.device | None:
    return next((weight.device for weight in learnt.values() if weight.is_cuda), None)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
