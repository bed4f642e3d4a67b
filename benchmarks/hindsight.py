"""The automatic policy beside the best drafter and tree size of each kind of work, chosen when all is known.

    python benchmarks/hindsight.py --json benchmarks/results/hindsight.json

Everything runs with our CPU kernels and takes turns on each prompt; what is compared is the speed after the first
token. The best of a dozen is the luckiest too, so that even its equal would seem a little slower. Finished runs are
kept beside the report, and the same command goes on with them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.bench.compare import begin
from specdec.bench.disturbance import Disturbance
from specdec.bench.machine import machine
from specdec.bench.methods import KERNELS
from specdec.bench.run import ALL, Comparison
from specdec.bench.workloads import KINDS, Prompt, first_of_each, own
from specdec.commands import console
from specdec.commands.bench_show import Live

PLAIN, AUTO = f"plain{KERNELS}", f"auto{KERNELS}"
SIZES = {2: "2:2:2", 4: "4:4:4", 8: "8:8:4", 16: "16:16:4"}  # nodes, depth and width; drafters cut as they think best
GRID = {"auto": (2, 4, 8, 16), "suffix": (4, 8, 16), "ngram": (4, 8, 16), "recycling": (4, 8)}
FIXED = tuple(f"{drafter}@fixed:{SIZES[nodes]}{KERNELS}" for drafter, sizes in GRID.items() for nodes in sizes)
LONG = "long_document"  # one of them, as each takes seconds to be read


def main(
    model: str = "demo",
    prompts: int = 2,
    repeats: int = 1,
    max_new_tokens: int = 64,
    fresh: bool = False,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/hindsight.json"),
) -> None:
    """Measure what is not measured yet, print the table, and write all."""
    target, tokenizer = console.load(model)
    settings: dict[str, Any] = {"name": model, "runs": json_path.with_suffix(".runs.jsonl"), "fresh": fresh}
    comparison = begin(target, tokenizer, asked(prompts), (PLAIN, AUTO, *FIXED), max_new_tokens, **settings)
    with Live(comparison) as live:
        comparison.run(repeats, tell=live.tell)
    report = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, **figures(comparison)}
    for row in report["hindsight"]:
        console.output.print({key: row[key] for key in row if key != "speeds"}, highlight=False)
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    if comparison.file is not None:
        comparison.file.write("done")


def asked(count: int) -> list[Prompt]:
    """The first prompts of each kind of work, what the user says later left out."""
    kinds = [kind for kind in KINDS if kind != LONG]
    return [replace(prompt, turns=()) for prompt in (*first_of_each(own(kinds), count), *own([LONG])[:1])]


def figures(comparison: Comparison) -> dict[str, Any]:
    """What is written beside the machine: a row for each kind of work, differences, and how quiet it was."""
    kinds = [kind for kind in comparison.groups if kind != ALL]
    watch = comparison.disturbance or Disturbance()
    return {
        "repeats": max(map(len, comparison.runs.values())),
        "hindsight": [compared(comparison, kind) for kind in kinds],
        "differences": [str(difference) for difference in comparison.differences],
        "disturbance": watch.report(),
    }


def compared(comparison: Comparison, workload: str) -> dict[str, Any]:
    """The speeds over plain decoding with our kernels, the best fixed choice, and the policy's share of its speed.

    Nothing drafted is a choice too. Choices whose tokens differed from plain ``generate``'s are left out.
    """
    prompts = comparison.prompts(workload)
    equal = all(comparison.equal(name, workload) for name in (PLAIN, AUTO))
    row: dict[str, Any] = {"workload": workload, "prompts": len(prompts), "equal": equal}
    if not equal:
        return row
    names = [PLAIN, *(name for name in FIXED if comparison.equal(name, workload))]
    speeds = {name: middle(comparison.ratios(name, PLAIN, prompts)) for name in (AUTO, *names)}
    best = max(names, key=lambda name: speeds[name])
    share = middle(comparison.ratios(AUTO, best, prompts))
    rounded = {name: round(speed, 4) for name, speed in speeds.items()}
    return row | {"best": best, "share": round(share, 4), "speeds": rounded}


def middle(ratios: Sequence[Sequence[float]]) -> float:
    """The median over prompts of the median over each one's repeats; 0 where no tokens came after the first."""
    return statistics.median([statistics.median(each) for each in ratios] or [0.0])


if __name__ == "__main__":
    typer.run(main)
