"""Tokens per step of a LongSpec layer behind texts within and beyond its training length, and what it holds.

    python benchmarks/longspec.py --layer "with offsets=A.safetensors" --layer "without=B.safetensors" --json OUT

Each question stands behind as much of the long documents as makes the context so long, and is answered greedily with
chains of four guesses; the answer is compared with plain decoding's. Counts only: nothing here is timed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

import specdec
from specdec import cpu
from specdec.attach import attach
from specdec.bench.machine import machine
from specdec.bench.workloads import encode, first_of_each, own
from specdec.commands import console
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.drafters import LongSpecDrafter, NgramDrafter
from specdec.policies import FixedPolicy

DEPTH = 4
KINDS = ("chat", "code", "mathematics", "sql")  # those whose answers are not copied from the question


class Weighed(LongSpecDrafter):
    """Notes how much it holds for a text, and how much of the target's it reads."""

    held = read = 0

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """As ever."""
        drafted = super().draft(contexts, budgets)
        for window in (context.scratch[self] for context in contexts if self in context.scratch):
            self.held = max(self.held, window.bytes)
            self.read = max(self.read, sum(rows.nbytes for rows in window.targets))
        return drafted


def main(
    layer: Annotated[list[str], typer.Option(help="NAME=PATH of a trained layer; may be given again.")],
    model: str = "demo",
    contexts: Annotated[str, typer.Option(help="Tokens, comma by comma.")] = "256,1024,2048,4096",
    prompts: Annotated[int, typer.Option(help="Questions of each kind.")] = 1,
    max_new_tokens: int = 64,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/longspec.json"),
) -> None:
    """Measure all layers behind all contexts, print it, and write all after each context."""
    target, tokenizer = console.load(model)
    drafters = {name: Weighed.load(path, target) for name, _, path in (each.partition("=") for each in layer)}
    methods = {"": speculate(NgramDrafter(), 0)} | {name: speculate(each, DEPTH) for name, each in drafters.items()}
    cpu.install(target)
    filler = [token for prompt in own(["long_document"]) for token in encode(tokenizer, prompt)]
    questions = [encode(tokenizer, prompt) for prompt in first_of_each(own(KINDS), prompts)]
    report: dict[str, Any] = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, "depth": DEPTH}
    report |= {"trained": {name: trained(drafter) for name, drafter in drafters.items()}, "longspec": []}
    for context in map(int, console.split(contexts)):
        texts = [filler[: max(0, context - len(question))] + question for question in questions]
        counts = [counted(target, torch.tensor([text]), methods, max_new_tokens) for text in texts]
        for name, drafter in drafters.items():
            row = {"layer": name, "context": context, **summary([each[name] for each in counts])}
            row |= {"bytes": drafter.held, "bytes_read": drafter.read}
            report["longspec"].append(row)
            console.output.print(row, highlight=False)
        json_path.write_text(json.dumps(report, indent=1) + "\n")


def trained(drafter: LongSpecDrafter) -> dict[str, Any]:
    """A layer's size."""
    sizes = [weight.numel() for weight in drafter.layer.parameters()]
    kept = drafter.layer.kept
    return {"parameters": sum(sizes), "window": drafter.layer.window, "kept": None if kept is None else len(kept)}


def speculate(drafter: Drafter, depth: int) -> specdec.Speculate:
    """Greedy chains of one depth; for a depth of 0, plain decoding."""
    made = specdec.Speculate(drafter, FixedPolicy(depth, depth, 1), on_unsupported="error")
    made.trial = partial(attach, timed=False)
    return made


def counted(
    target: Any, ids: torch.Tensor, methods: dict[str, specdec.Speculate], max_new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Of each method's answer to one prompt: tokens, steps, guesses, and whether it is the first one's."""
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        for piece in ids[:, :-1].split(1024, 1):
            target(piece, past_key_values=cache, logits_to_keep=1)
    found, plain = dict[str, dict[str, Any]](), list[int]()
    asked = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    for name, method in methods.items():
        output = target.generate(ids, past_key_values=deepcopy(cache), custom_generate=method, **asked)
        text, stats = output.sequences[0, ids.shape[1] :].tolist(), output.stats
        plain = plain or text
        found[name] = {"tokens": len(text), "steps": stats.steps, "drafted": stats.drafted}
        found[name] |= {"accepted": stats.accepted, "equal": text == plain}
    return found


def summary(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all prompts: tokens per step, and its range; the share of guesses that were right; equality."""
    rates = [each["tokens"] / each["steps"] for each in counts]
    total = {name: sum(each[name] for each in counts) for name in ("tokens", "steps", "drafted", "accepted")}
    return {
        "prompts": len(counts),
        "equal": all(each["equal"] for each in counts),
        "tokens_per_step": total["tokens"] / total["steps"],
        "least": min(rates),
        "most": max(rates),
        "accepted": total["accepted"] / max(1, total["drafted"]),
    }


if __name__ == "__main__":
    typer.run(main)
