"""A request that cannot be a row among others: answered by the ordinary path, and given up when it is."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from specdec.generate import Generate
from specdec.pool.request import Request
from specdec.statistics import Stats


class GivenUp(Exception):  # noqa: N818
    """Nobody waits for the result; raised inside a generation to end it."""


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing, but asks after every token whether the result is still wanted. Raises GivenUp."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        if self.request.give_up():
            raise GivenUp
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_alone(request: Request, ids: torch.Tensor, generate: Generate, namespace: str, tokenizer: Any) -> None:
    """Settle a request by one call of ``generate``; its counts are added to those of the Speculate behind that."""
    speculate, arguments = generate.speculate, request.arguments
    total, rules = speculate.stats, arguments.get("stopping_criteria") or []
    arguments = {**arguments, "stopping_criteria": StoppingCriteriaList([*rules, Watch(request)])}
    if request.streamer is not None:
        arguments["streamer"] = request.streamer
    speculate.stats = request.stats = Stats(total)
    speculate.namespace = namespace
    try:
        with nullcontext() if request.seed is None else torch.random.fork_rng(devices=_devices(ids)):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            output = generate(ids, **arguments)
        request.answer(output, ids.shape[1], tokenizer)
    except GivenUp:
        pass
    except Exception as error:
        request.fail(error)
    finally:
        speculate.stats = total
        total.generations += request.stats.generations
        total.plain_generations += request.stats.plain_generations


def _devices(ids: torch.Tensor) -> list[torch.device]:
    return [ids.device] if ids.device.type == "cuda" else []
