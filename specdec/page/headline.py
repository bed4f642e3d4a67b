"""What a report says in plain sentences: the best figure, what it is made of, and where it is beaten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

ALL = "all"

Record = dict[str, Any]


def ours(report: Record) -> set[str]:
    """The methods that decode by our loop: those whose steps the report tells of."""
    return {part["method"] for part in report["parts"]}


def best(report: Record) -> Record | None:
    """Our method whose speedup over all work is surest: the one with the highest lower end of its interval."""
    mine = [r for r in _timed(report["results"]) if r["workload"] == ALL and r["method"] in ours(report)]
    return max(mine, key=lambda r: float(r["speedup_low"] or 0), default=None)


def setting(report: Record) -> str:
    """What the figures hold for."""
    machine = report["machine"]
    return (
        f"{machine['model']} ({machine['parameters'] / 1e6:,.0f}M parameters, {machine['dtype']}) on "
        f"{machine['device']}, {machine['threads']} threads; at most {report['max_new_tokens']} new tokens; "
        f"timed runs of each prompt: at most {report['repeats']}."
    )


def headline(report: Record) -> str:
    """The first sentence: what was compared with what, and the best honest figure."""
    first = best(report)
    if report["disturbance"]["refused"]:
        return "Other load disturbed this run too much: it has no speeds."
    if first is None:
        return "No method of ours produced the same tokens as plain generate with a speed to show."
    kinds = len({r["workload"] for r in report["results"]} - {ALL})
    return (
        f"{first['method']} decodes {times(first['speedup'])} as fast as {first['baseline']} generate, with the same "
        f"tokens, over {first['prompts']} prompts of {kinds} kinds of work (95% interval {interval(first)})."
    )


def made_of(report: Record) -> str:
    """How much of the best figure is the kernels' and how much the guesses'; empty where that was not measured."""
    first = best(report)
    if first is None or not first["method"].endswith("+kernels"):
        return ""
    over_all = {r["method"]: r for r in _timed(report["results"]) if r["workload"] == ALL}
    alone = [
        f"{what} {times(over_all[name]['speedup'])} ({interval(over_all[name])})"
        for what, name in (
            ("the CPU kernels without guesses", "plain+kernels"),
            ("guesses without the kernels", first["method"].removesuffix("+kernels")),
        )
        if name in over_all
    ]
    return f"Taken apart: {'; '.join(alone)}." if alone else ""


def losses(report: Record) -> list[str]:
    """Where we lose: work on which ours is slower than plain, or than another method; and methods that differ."""
    first = best(report)
    records = [r for r in _timed(report["results"]) if r["workload"] != ALL]
    said = _slower(r for r in records if r["method"] in ours(report) and r["speedup"] < 1)
    if first is not None:
        others = [r for r in records if r["method"] not in ours(report)]
        said += _beaten([r for r in records if r["method"] == first["method"]], others)
    failed = {d["method"] for d in report["differences"]}
    return said + [f"{method} failed: its tokens differ from plain generate's." for method in sorted(failed)]


def _slower(records: Iterable[Record]) -> list[str]:
    on: dict[str, list[str]] = {}
    for record in records:
        on.setdefault(record["method"], []).append(f"{record['workload']} {times(record['speedup'])}")
    return [f"{method} is slower than plain generate: {', '.join(work)}." for method, work in on.items()]


def _beaten(mine: Iterable[Record], others: Sequence[Record]) -> list[str]:
    said = []
    for record in mine:
        rivals = [r for r in others if r["workload"] == record["workload"] and r["speedup"] > record["speedup"]]
        if rivals:
            first = max(rivals, key=lambda r: float(r["speedup"]))
            faster = f"{first['method']} is faster than {record['method']}"
            said.append(f"On {record['workload']}, {faster}: {times(first['speedup'])} to {times(record['speedup'])}.")
    return said


def times(value: float) -> str:
    """A speedup as it is written everywhere: 3.25×."""
    return f"{value:.2f}×"


def interval(record: Record) -> str:
    """A record's 95% interval; a single prompt has none."""
    if record["speedup_low"] is None:
        return "unknown from one prompt"
    return f"{record['speedup_low']:.2f} to {record['speedup_high']:.2f}"


def _timed(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["speedup"] is not None]
