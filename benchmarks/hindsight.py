"""The automatic policy beside the best drafter and tree size of each kind of work, chosen when all is known.

    python benchmarks/hindsight.py --json benchmarks/results/hindsight.json

Everything runs with our CPU kernels and takes turns on each prompt; what is compared is the speed after the first
token. The best of a dozen is the luckiest too, so that even its equal would seem slower. So all are run once, which
says what is the best for each kind of work, and these run again beside the policy, which says how far they are apart.
Finished runs are kept beside the report, and the same command goes on with them.
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
    """Measure what is not measured yet, print the table, and write all; ``repeats`` are those of the best ones."""
    target, tokenizer = console.load(model)

    def ran(names: Sequence[str], repeats: int, suffix: str) -> Comparison:
        settings: dict[str, Any] = {"name": model, "runs": json_path.with_suffix(suffix), "fresh": fresh}
        comparison = begin(target, tokenizer, asked(prompts), (PLAIN, AUTO, *names), max_new_tokens, **settings)
        with Live(comparison) as live:
            comparison.run(repeats, tell=live.tell)
        return comparison

    first = ran(FIXED, 1, ".runs.jsonl")
    again = ran(sorted(set(bests(first).values()) - {PLAIN}), repeats, ".again.jsonl")
    report = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, **figures(first, again)}
    for row in report["hindsight"]:
        console.output.print({key: row[key] for key in row if key != "speeds"}, highlight=False)
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    for comparison in (first, again):
        if comparison.file is not None:
            comparison.file.write("done")


def asked(count: int) -> list[Prompt]:
    """The first prompts of each kind of work, what the user says later left out."""
    kinds = [kind for kind in KINDS if kind != LONG]
    return [replace(prompt, turns=()) for prompt in (*first_of_each(own(kinds), count), *own([LONG])[:1])]


def figures(first: Comparison, again: Comparison) -> dict[str, Any]:
    """What is written beside the machine: a row for each kind of work, differences, and how quiet it was."""
    best = bests(first)
    watch = Disturbance(
        probes=[probe for each in (first, again) if each.disturbance for probe in each.disturbance.probes]
    )
    return {
        "repeats": max(map(len, again.runs.values())),
        "hindsight": [compared(first, again, kind, best[kind]) for kind in best],
        "differences": [str(difference) for each in (first, again) for difference in each.differences],
        "disturbance": watch.report(),
    }


def bests(first: Comparison) -> dict[str, str]:
    """The quickest choice for each kind of work. That nothing is drafted is a choice too.

    Choices whose tokens differed from plain ``generate``'s are left out.
    """
    best = {}
    for kind in (kind for kind in first.groups if kind != ALL):
        speed = speeds(first, kind)
        best[kind] = max((name for name in speed if name != AUTO), key=lambda name: speed[name], default=PLAIN)
    return best


def speeds(comparison: Comparison, workload: str) -> dict[str, float]:
    """Of all that have plain ``generate``'s tokens, over plain decoding with our kernels; none where that has not."""
    prompts = comparison.prompts(workload)
    names = [name for name in comparison.names if name in (PLAIN, AUTO, *FIXED) and comparison.equal(name, workload)]
    told = names if PLAIN in names else []
    return {name: round(middle(comparison.ratios(name, PLAIN, prompts)), 4) for name in told}


def compared(first: Comparison, again: Comparison, workload: str, best: str) -> dict[str, Any]:
    """All speeds of the first runs, those of policy and best choice in the others, and the policy's share there."""
    row = {"workload": workload, "prompts": len(first.prompts(workload)), "best": best}
    once, speed = speeds(first, workload), speeds(again, workload)
    if not {AUTO, best} <= set(speed) or AUTO not in once:
        return row | {"equal": False}
    share = round(middle(again.ratios(AUTO, best, again.prompts(workload))), 4)
    return row | {"equal": True, "share": share, "again": {name: speed[name] for name in (AUTO, best)}, "speeds": once}


def middle(ratios: Sequence[Sequence[float]]) -> float:
    """The median over prompts of the median over each one's repeats; 0 where no tokens came after the first."""
    return statistics.median([statistics.median(each) for each in ratios] or [0.0])


if __name__ == "__main__":
    typer.run(main)
