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
from specdec.bench.machine import machine
from specdec.commands import console


def main(
    model: str = "demo",
    tokens: Annotated[int, typer.Option(help="Tokens to compare at least.")] = 20_000,
    max_new_tokens: int = 256,
    batch: Annotated[int, typer.Option(help="Prompts in one call.")] = 4,
    questions: Annotated[list[Path] | None, typer.Option(help="JSONL of further prompts.")] = None,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/equality.json"),
) -> None:
    """Compare until enough tokens have been; exit status 1 if any differ."""
    target, tokenizer = console.load(model)
    prompts = _mixed([*workloads.own(), *itertools.chain.from_iterable(workloads.read(p) for p in questions or [])])
    report: dict[str, Any] = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, "prompts": []}
    if json_path.exists():
        report["prompts"] = json.loads(json_path.read_text())["prompts"]
    for start in track(range(len(report["prompts"]), len(prompts), batch), "comparing"):
        if sum(each["tokens"] for each in report["prompts"]) >= tokens:
            break
        asked = prompts[start : start + batch]
        compared = _compared(target, [workloads.encode(tokenizer, prompt) for prompt in asked], max_new_tokens)
        report["prompts"] += [
            {"workload": prompt.workload, **each} for prompt, each in zip(asked, compared, strict=True)
        ]
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


def _compared(target: Any, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    longest, pad = max(map(len, prompts)), target.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    arguments = {"attention_mask": mask, "max_new_tokens": max_new_tokens, "do_sample": False}
    scored = target.generate(ids, output_logits=True, return_dict_in_generate=True, **arguments)
    with specdec.speculating(target, cpu_kernels=True, on_unsupported="error"):
        ours = target.generate(ids, **arguments)
    closest = torch.stack(scored.logits, 1).topk(2).values
    margins = closest[:, :, 0] - closest[:, :, 1]
    ends = {pad, *_listed(target.generation_config.eos_token_id)}
    rows = zip(scored.sequences[:, longest:].tolist(), ours[:, longest:].tolist(), margins.tolist(), strict=True)
    return [_row(*row, ends) for row in rows]


def _row(plain: list[int], ours: list[int], margins: list[float], ends: set[int]) -> dict[str, Any]:
    """How many tokens of an answer are equal, where they differ, and by how little the closest was chosen."""
    length = next((i + 1 for i, token in enumerate(plain) if token in ends), len(plain))
    at = next((i for i in range(length) if ours[i : i + 1] != plain[i : i + 1]), None)
    tokens = length if at is None else at
    return {"tokens": tokens, "differs_at": at, "margin": min(margins[:length]) if at is None else margins[at]}


def _listed(ids: int | list[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else ids


if __name__ == "__main__":
    typer.run(main)
