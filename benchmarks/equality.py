"""Long greedy runs with our CPU kernels and drafts against plain ``generate``: the first token that differs, if any.

    python benchmarks/equality.py --tokens 20000 --json benchmarks/results/equality.json [--questions FILE]...

Kernels and passes over several tokens round differently from plain decoding, so two tokens that are all but equally
likely could change places. This counts how often they do. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import specdec
from specdec.bench import workloads
from specdec.bench.report import machine
from specdec.commands import console


def main(
    model: str = "demo",
    tokens: Annotated[int, typer.Option(help="Tokens to compare at least.")] = 20_000,
    max_new_tokens: int = 256,
    questions: Annotated[list[Path] | None, typer.Option(help="JSONL of further prompts.")] = None,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/equality.json"),
) -> None:
    """Compare until enough tokens have been; exit status 1 if any differ."""
    target, tokenizer = console.load(model)
    prompts = _mixed([*workloads.own(), *itertools.chain.from_iterable(workloads.read(p) for p in questions or [])])
    report: dict[str, Any] = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, "prompts": []}
    if json_path.exists():
        report["prompts"] = json.loads(json_path.read_text())["prompts"]
    for prompt in track(prompts[len(report["prompts"]) :], "comparing"):
        if sum(each["tokens"] for each in report["prompts"]) >= tokens:
            break
        ids = torch.tensor([workloads.encode(tokenizer, prompt)])
        report["prompts"].append({"workload": prompt.workload, **_compared(target, ids, max_new_tokens)})
        partial = json_path.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, json_path)
    differences = [each for each in report["prompts"] if each["differs_at"] is not None]
    total = sum(each["tokens"] for each in report["prompts"])
    console.output.print(f"{total} tokens of {len(report['prompts'])} prompts, {len(differences)} answers differ")
    for each in differences:
        console.output.print(each)
    raise typer.Exit(bool(differences))


def _mixed(prompts: list[workloads.Prompt]) -> list[workloads.Prompt]:
    """Kinds of work in turn."""
    kinds: dict[str, list[workloads.Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.workload, []).append(prompt)
    return [each for turn in itertools.zip_longest(*kinds.values()) for each in turn if each is not None]


def _compared(target: Any, ids: torch.Tensor, max_new_tokens: int) -> dict[str, Any]:
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False}
    scored = target.generate(ids, output_logits=True, return_dict_in_generate=True, **arguments)
    plain = scored.sequences[0, ids.shape[1] :]
    with specdec.speculating(target, cpu_kernels=True, on_unsupported="error"):
        ours = target.generate(ids, **arguments)[0, ids.shape[1] :]
    same = min(len(plain), len(ours))
    different = (plain[:same] != ours[:same]).nonzero()
    at = int(different[0]) if len(different) else None if len(plain) == len(ours) else same
    best = (
        torch.cat(scored.logits).topk(2).values if at is None else scored.logits[min(at, len(plain) - 1)].topk(2).values
    )
    margin = float((best[:, 0] - best[:, 1]).min())  # of the closest call, or of the one that changed
    return {"tokens": len(plain) if at is None else at, "differs_at": at, "margin": margin}


if __name__ == "__main__":
    typer.run(main)
