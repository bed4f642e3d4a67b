"""Reports of ``specdec bench``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tables.markdown import Report, check_quiet, machine, read, table


def figures(directory: Path, methods: Sequence[str] = (), against: bool = False) -> str:
    """All reports of speed in a directory in Markdown; those on others' questions only ``against`` other methods.

    Args:
        methods: which to show; all by default.
        against: whether to show speeds over other methods than plain ``generate`` too.
    """
    reports = [report for report in read(directory, "overhead") if against or "source" not in report]
    return "\n\n".join(section(report, methods, against) for report in reports) or "not measured yet"


def section(report: Report, methods: Sequence[str], against: bool) -> str:
    """One report: what it holds for, speeds by workload and method, and what a step costs beside the pass."""
    check_quiet(report)
    parts = [_speed_machine(report), _table(report["results"], methods), _loops(report["results"], methods)]
    others = report.get("against", []) if against else []
    for baseline in dict.fromkeys(r["baseline"] for r in others):
        shown = [r for r in others if r["baseline"] == baseline and r["method"].endswith("+kernels")]
        parts += [f"The same runs with `{baseline}` in place of plain `generate`:", _table(shown, methods)]
    parts.append(_overhead(report["overhead"]))
    parts += [f"`{name}` did not run: {reason}." for name, reason in report.get("unavailable", {}).items() if against]
    if report["differences"]:
        parts.append(
            "Tokens differed, hence no speed:\n\n" + "\n".join(f"- {d['text']}" for d in report["differences"])
        )
    return "\n\n".join(part for part in parts if part)


def _loops(results: Sequence[Report], methods: Sequence[str]) -> str:
    """How many answers loop, and what the speeds are without those; nothing where none does."""
    whole = [r for r in results if r["workload"] == "all" and r["method"] not in ("plain", r["baseline"])]
    shown = [r for r in whole if r["method"] in (methods or [r["method"]]) and r.get("speedup_without_loops")]
    if not any(r["loops"] for r in shown):
        return ""
    figures = ", ".join(f"{r['method']} {r['speedup_without_loops']:.2f}x" for r in shown)
    first = shown[0]
    return f"{first['loops']} of {first['prompts']} answers end in a loop. Over all without them: {figures}."


def _speed_machine(report: Report) -> str:
    asked = f"Asked: {report['source']}. " if "source" in report else ""
    return (
        f"{asked}{machine(report['machine'])}; greedy, batch "
        f"1, at most {report['max_new_tokens']} tokens, timed runs of each prompt: up to {report['repeats']}. Speed of "
        "decoding over plain `generate` (median over prompts, in brackets its 95% interval) / tokens per pass:"
    )


def _table(results: Sequence[Report], methods: Sequence[str]) -> str:
    names = [name for name in dict.fromkeys(r["method"] for r in results) if name in (methods or [name])]
    names = [name for name in names if name not in ("plain", results[0]["baseline"])]
    cells = {(r["workload"], r["method"]): _cell(r) for r in results}
    rows = [[workload, *(cells[workload, name] for name in names)] for workload in dict.fromkeys(w for w, _ in cells)]
    if len(rows) > 2:
        kinds = [[r for r in results if r["method"] == name and r["workload"] != "all"] for name in names]
        rows.append(["mean of the kinds, the least", *map(_mean, kinds)])
    return table(["workload", *names], rows)


def _mean(kinds: Sequence[Report]) -> str:
    """The mean of the speeds on all kinds of work, and the lowest of them; nothing where one has none."""
    speeds = [r["speedup"] for r in kinds if r["equal"] and r["speedup"] is not None]
    return f"{statistics.mean(speeds):.2f}x, {min(speeds):.2f}x" if len(speeds) == len(kinds) else "-"


def _cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    if r["speedup"] is None:
        return "-"
    spread = "" if r["speedup_low"] is None else f" ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})"
    steps = "-" if r["tokens_per_step"] is None else f"{r['tokens_per_step']:.2f}"
    return f"{r['speedup']:.2f}x{spread} / {steps}"


def _overhead(cost: Report) -> str:
    return (
        f"Outside the target's pass a step takes {cost['outside_ms']:.2f} ms, {cost['ratio']:.1%} of the pass's "
        f"{cost['pass_ms']:.1f} ms ({cost['drafter']}, {cost['nodes']} nodes)."
    )


def same_twice(directory: Path) -> str:
    """What benchmarks/same_twice.py found, in Markdown."""
    return "\n\n".join(map(_twice_section, read(directory, "same_twice"))) or "not measured yet"


def _twice_section(report: Report) -> str:
    runs = report["same_twice"]
    apart = [abs(r["again"] / r["speed"] - 1) for r in runs]
    width = statistics.median((r["high"] - r["low"]) / r["speed"] for r in runs)
    return (
        f"{machine(report['machine'])}: in {sum(r['within'] for r in runs)} of {len(runs)} comparisons the two speeds "
        f"differed by less than the interval is wide; they were {statistics.median(apart):.1%} apart in the median, "
        f"{max(apart):.1%} at most, and intervals {width:.0%} of the speed wide."
    )
