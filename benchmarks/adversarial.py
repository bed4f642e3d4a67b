"""What speculation costs where it cannot help: the automatic policy beside plain decoding with the same kernels.

    python benchmarks/adversarial.py --json benchmarks/results/adversarial.json

Random text drawn at a high temperature, and a drafter that is always sure and always wrong; one row and four; each
run starts with nothing learnt, and its first tokens count. Runs take turns, and the median of their ratios counts.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer

import specdec
from specdec import cpu
from specdec.bench.interval import bootstrap
from specdec.bench.machine import machine
from specdec.commands import console
from specdec.core import Budget, Context, Drafter, DraftTree

SECONDS = ("plain", "ours")


class Liar:
    """Guesses a full chain of tokens that hardly follow anything, and is sure of each."""

    name, topk, hidden = "liar", 0, False

    def __init__(self, vocab: int) -> None:
        self.rng, self.vocab = np.random.default_rng(0), vocab

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """As long as may be."""
        return [self._chain(int(c.tokens[-1]), min(b.nodes, b.depth)) for c, b in zip(contexts, budgets, strict=True)]

    def _chain(self, root: int, length: int) -> DraftTree:
        guesses = self.rng.integers(self.vocab // 2, self.vocab, length).tolist()
        return DraftTree.chain(root, guesses, (0.99 ** np.arange(1, length + 1)).tolist(), self.name)


def main(
    model: str = "demo",
    max_new_tokens: int = 100,
    repeats: int = 9,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/adversarial.json"),
) -> None:
    """Measure each case, print it, and write all."""
    target, _ = console.load(model)
    vocab = target.config.vocab_size
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 20.0, "top_k": 0, "top_p": 1.0}
    cases: dict[str, tuple[str | Drafter, dict[str, Any]]] = {
        "random text": ("auto", sampled),
        "a drafter that lies": (Liar(vocab), {"do_sample": False}),
    }
    report: dict[str, Any] = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, "adversarial": []}
    for name, (drafter, drawing) in cases.items():
        for rows in (1, 4):
            ids = torch.from_numpy(np.random.default_rng(rows).integers(5, vocab, (rows, 64)))
            arguments = {"max_new_tokens": max_new_tokens, "eos_token_id": vocab - 1, **drawing}  # hardly ever drawn
            row = {"case": name, "rows": rows, **compared(target, drafter, ids, arguments, repeats)}
            console.output.print(row, highlight=False)
            report["adversarial"].append(row)
    json_path.write_text(json.dumps(report, indent=1) + "\n")


def compared(
    target: Any, drafter: str | Drafter, ids: torch.Tensor, arguments: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Median seconds after the prompt's pass of both, and the median ratio with its 95% interval."""
    times: dict[str, list[float]] = {name: [] for name in SECONDS}
    cpu.install(target)
    try:
        for repeat in range(-1, repeats):  # the first warms up
            plain, ours = copy.copy(target), specdec.wrap(copy.copy(target), drafter, cpu_kernels=False)
            vars(ours)["generate"].speculate.attach(ours)
            turns = [("plain", plain), ("ours", ours)]
            seconds, tokens = {}, {}
            for name, each in turns if repeat % 2 else turns[::-1]:
                seconds[name], tokens[name] = decoded(each, ids, arguments, repeat)
            assert torch.equal(tokens["plain"], tokens["ours"]), "a figure of other tokens means nothing"
            if repeat >= 0:
                for name in SECONDS:
                    times[name].append(seconds[name])
    finally:
        cpu.remove(target)
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    low, high = bootstrap(ratios)
    medians = {name: statistics.median(times[name]) for name in SECONDS}
    figures = {"speed": statistics.median(ratios), "low": low, "high": high}
    figures |= {f"{name}_seconds": seconds for name, seconds in medians.items()}
    return {name: round(value, 4) for name, value in figures.items()} | {
        "drafted": specdec.stats(ours).drafted,
        "accepted": specdec.stats(ours).accepted,
    }


def decoded(model: Any, ids: torch.Tensor, arguments: dict[str, Any], seed: int) -> tuple[float, torch.Tensor]:
    """Seconds of all tokens but the first, and the tokens."""
    mask, seconds = torch.ones_like(ids), []
    for part in ({"max_new_tokens": 1}, {}):
        torch.manual_seed(seed)
        start = perf_counter()
        tokens = model.generate(ids, attention_mask=mask, **{**arguments, **part})
        seconds.append(perf_counter() - start)
    return seconds[1] - seconds[0], tokens


if __name__ == "__main__":
    typer.run(main)
