"""Reports of the automatic policy beside what would have been best."""

from __future__ import annotations

import statistics
from pathlib import Path

from tables.markdown import Report, check_quiet, machine, read, table

GOAL = 0.95


def hindsight(directory: Path) -> str:
    """What benchmarks/hindsight.py found, in Markdown."""
    return "\n\n".join(map(_section, read(directory, "hindsight"))) or "not measured yet"


def _section(report: Report) -> str:
    check_quiet(report)
    rows = [r for r in report["hindsight"] if r["equal"]]
    head = (
        f"{machine(report['machine'])}; greedy, {report['max_new_tokens']} tokens, those after the first timed. "
        "Each kind's best choice is that of a first run of each prompt. Speeds are of "
        f"{report['repeats']} more, tokens per second of all prompts of a kind, over plain decoding with our kernels:"
    )
    names = ["workload", "prompts", "auto", "best fixed choice", "its speed", "auto / best"]
    differ = [f"Tokens differed on {r['workload']}, hence no speed." for r in report["hindsight"] if not r["equal"]]
    return "\n\n".join([head, table(names, list(map(_cells, rows))), *_told(rows), *differ])


def _told(rows: list[Report]) -> list[str]:
    shares = [r["share"] for r in rows]
    if not shares:
        return []
    reached = f"{sum(share >= GOAL for share in shares)} of {len(shares)} reach {GOAL}"
    return [f"The median of `auto / best` is {statistics.median(shares):.2f}, the least {min(shares):.2f}; {reached}."]


def _cells(r: Report) -> list[str]:
    plain, auto, best = (r["again"][name] for name in ("plain+kernels", "auto+kernels", r["best"]))
    named = f"`{r['best'].removesuffix('+kernels')}`"
    return [
        r["workload"],
        str(r["prompts"]),
        f"{auto / plain:.2f}x",
        named,
        f"{best / plain:.2f}x",
        f"{r['share']:.2f}",
    ]
