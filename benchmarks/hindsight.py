"""The automatic policy beside the best drafter and tree size of each kind of work, chosen when all is known.

    python benchmarks/hindsight.py --json benchmarks/results/hindsight.json

Everything runs with our CPU kernels and takes turns on each prompt; what is compared is tokens per second after the
first one, over all prompts of a kind. The best of a dozen is the luckiest too, so that even its equal would seem
slower. So all are run once, which says what is the best for each kind of work, and these run again beside the policy,
which says how far they are apart. Finished runs are kept beside the report; the same command goes on with them.
"""

from __future__ import annotations

import json
import statistics
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
FIRST, OTHERS, NEVER = slice(1), slice(1, None), -1.0  # runs of a prompt; no interval is so narrow
LONG, FEWER = "long_document", 2  # of these, as each takes seconds to be read


def main(
    model: str = "demo",
    prompts: int = 4,
    repeats: int = 3,
    max_new_tokens: int = 64,
    fresh: bool = False,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/hindsight.json"),
) -> None:
    """Measure what is not measured yet, print the table, and write all; ``repeats`` are those of the best ones."""
    target, tokenizer = console.load(model)
    names, runs = (PLAIN, AUTO, *FIXED), json_path.with_suffix(".runs.jsonl")
    comparison = begin(target, tokenizer, asked(prompts), names, max_new_tokens, name=model, runs=runs, fresh=fresh)
    with Live(comparison) as live:
        comparison.run(1, tell=live.tell)
        comparison.run(1 + repeats, NEVER, tell=live.tell, names={PLAIN, AUTO, *bests(comparison).values()})
    report = {"machine": machine(target, model), "max_new_tokens": max_new_tokens, **figures(comparison)}
    for row in report["hindsight"]:
        console.output.print({key: row[key] for key in row if key != "speeds"}, highlight=False)
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    if comparison.file is not None:
        comparison.file.write("done")


def asked(count: int) -> list[Prompt]:
    """The first prompts of each kind of work, what the user says later left out."""
    kinds = [kind for kind in KINDS if kind != LONG]
    chosen = *first_of_each(own(kinds), count), *own([LONG])[: min(count, FEWER)]
    return [replace(prompt, turns=()) for prompt in chosen]


def figures(comparison: Comparison) -> dict[str, Any]:
    """What is written beside the machine: a row for each kind of work, differences, and how quiet it was."""
    watch = comparison.disturbance or Disturbance()
    return {
        "repeats": max(map(len, comparison.runs.values())) - 1,
        "hindsight": [compared(comparison, kind, best) for kind, best in bests(comparison).items()],
        "differences": [str(difference) for difference in comparison.differences],
        "disturbance": watch.report(),
    }


def bests(comparison: Comparison) -> dict[str, str]:
    """The quickest choice for each kind of work, by its first runs. That nothing is drafted is a choice too.

    Choices whose tokens differed from plain ``generate``'s are left out.
    """
    best = {}
    for kind in (kind for kind in comparison.groups if kind != ALL):
        speed = speeds(comparison, kind, FIRST)
        best[kind] = max((name for name in speed if name != AUTO), key=lambda name: speed[name], default=PLAIN)
    return best


def compared(comparison: Comparison, workload: str, best: str) -> dict[str, Any]:
    """All speeds of the first runs, those of policy and best choice in the others, and the policy's share there."""
    row = {"workload": workload, "prompts": len(comparison.prompts(workload)), "best": best}
    once, again = speeds(comparison, workload, FIRST), speeds(comparison, workload, OTHERS)
    if not {AUTO, best} <= set(again):
        return row | {"equal": False}
    told = {name: round(again[name], 4) for name in (PLAIN, AUTO, best)}
    once = {name: round(speed, 4) for name, speed in once.items()}
    return row | {"equal": True, "share": round(again[AUTO] / again[best], 4), "again": told, "speeds": once}


def speeds(comparison: Comparison, workload: str, part: slice) -> dict[str, float]:
    """Tokens per second of all that have plain ``generate``'s tokens; none where what drafts nothing has not.

    Of a prompt's runs, a ``part`` of each method's, the median counts.
    """
    names = [name for name in comparison.names if name in (PLAIN, AUTO, *FIXED) and comparison.equal(name, workload)]
    told = {name: _speed(comparison, name, workload, part) for name in names}
    return {name: speed for name, speed in told.items() if speed} if PLAIN in told else {}


def _speed(comparison: Comparison, name: str, workload: str, part: slice) -> float:
    """0 where it was not run."""
    runs = [comparison.runs.get((name, prompt), [])[part] for prompt in comparison.prompts(workload)]
    seconds = sum(statistics.median(run.decode for run in each) for each in runs if each)
    return sum(each[0].decoded for each in runs if each) / seconds if seconds else 0.0


if __name__ == "__main__":
    typer.run(main)
