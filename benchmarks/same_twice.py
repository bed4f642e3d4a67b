"""How far to believe an interval: the same method measured as two, again and again.

    python benchmarks/same_twice.py --json benchmarks/results/same_twice.json

Each run is a whole comparison, as ``specdec bench`` makes it. It goes on where it was stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.bench import workloads
from specdec.bench.disturbance import Disturbance
from specdec.bench.machine import machine
from specdec.bench.report import results
from specdec.bench.run import Comparison, encode_all
from specdec.commands import console

TWINS = ("auto+kernels", "auto@auto+kernels")  # two ways to write what ``wrap`` does by default


def main(
    model: str = "demo",
    runs: int = 20,
    prompts: int = 4,
    max_new_tokens: int = 32,
    repeats: int = 3,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/same_twice.json"),
) -> None:
    """Measure until there are ``runs`` of them; those that other load disturbed are not kept."""
    target, tokenizer = console.load(model)
    report = json.loads(json_path.read_text()) if json_path.exists() else {"same_twice": []}
    report["machine"] = machine(target, model)
    kinds = workloads.first_of_each(workloads.own(), 1)
    asks = encode_all(target, tokenizer, kinds[:: len(kinds) // prompts][:prompts], max_new_tokens)
    while len(report["same_twice"]) < runs:
        comparison = Comparison(target, asks, TWINS, max_new_tokens, Disturbance())
        comparison.run(repeats)
        if comparison.disturbance is None or comparison.disturbance.disturbed:
            console.output.print("disturbed, and measured again")
            continue
        report["same_twice"].append(row := twins(comparison))
        console.output.print(row, highlight=False)
        json_path.write_text(json.dumps(report, indent=1) + "\n")


def twins(comparison: Comparison) -> dict[str, Any]:
    """Both speeds over all prompts, the first's interval, and whether they differ by less than it is wide."""
    found = {r["method"]: r for r in results(comparison) if r["workload"] == "all"}
    one, other = (found[name] for name in TWINS)
    width = one["speedup_high"] - one["speedup_low"]
    return {
        "speed": one["speedup"],
        "low": one["speedup_low"],
        "high": one["speedup_high"],
        "again": other["speedup"],
        "within": abs(one["speedup"] - other["speedup"]) < width,
    }


if __name__ == "__main__":
    typer.run(main)
