"""Reports of drafters that are models."""

from __future__ import annotations

from pathlib import Path

from tables.markdown import Report, machine, read, table


def drafts(directory: Path) -> str:
    """What benchmarks/drafts.py found, in Markdown."""
    return "\n\n".join(map(_report, read(directory, "drafts"))) or "not measured yet"


def _report(report: Report) -> str:
    """One table of each temperature and number of prompts that were timed at once, counts beside speeds."""
    rows, disturbance = report["drafts"], report["disturbance"]
    parts = [f"{machine(report['machine'])}; answers of at most {report['max_new_tokens']} tokens."]
    if disturbance["disturbed"]:
        parts.append(f"Speeds are withheld, as they were taken beside other load: {disturbance['text']}.")
    counted = {(r["temperature"], r["method"]): r for r in rows if r["kind"] == "counted"}
    timed = [r for r in rows if r["kind"] == "timed"]
    for temperature in dict.fromkeys(r["temperature"] for r in rows):
        alone = {r["method"]: r for r in timed if (r["temperature"], r["rows"]) == (temperature, 1)}
        ours = {method: r for (at, method), r in counted.items() if at == temperature}
        parts.append(_alone(temperature, alone, ours, disturbance["disturbed"]))
    for rows_, temperature in dict.fromkeys((r["rows"], r["temperature"]) for r in timed if r["rows"] > 1):
        if not disturbance["disturbed"]:
            together = [r for r in timed if (r["rows"], r["temperature"]) == (rows_, temperature)]
            cells = [[r["method"], f"{r['tokens_per_step']:.2f}", _speed(r), _ratio(r, "speedup")] for r in together]
            names = ["method", "tokens per step", "tokens per second", "over plain"]
            parts.append(f"Temperature {temperature:g}, {rows_} at once:\n\n{table(names, cells)}")
    return "\n\n".join(parts)


def _alone(temperature: float, timed: dict[str, Report], counted: dict[str, Report], disturbed: bool) -> str:
    """One prompt at a time: what was counted, and how fast that was."""
    names, cells = ["method", "tokens per step"], []
    for method in dict.fromkeys([*timed, *counted]):
        r = timed.get(method, {})
        count = counted.get(method, r)["tokens_per_step"]
        cells.append([method, f"{count:.2f}", *([] if disturbed or not timed else _speeds(r))])
    names += [] if disturbed or not timed else ["tokens per second", "over plain", "over assisted"]
    how = f"Temperature {temperature:g}"
    how += f"; tokens per step of {next(iter(counted.values()))['prompts']} answers" if counted else ""
    how += "" if disturbed or not timed else f", speeds of {next(iter(timed.values()))['prompts']}, 95% in brackets"
    return f"{how}:\n\n{table(names, cells)}"


def _speeds(r: Report) -> list[str]:
    return [_speed(r), _ratio(r, "speedup"), _ratio(r, "over_assisted")]


def _speed(r: Report) -> str:
    """Where a greedy answer is not plain ``generate``'s, there is none."""
    return f"{r['tokens_per_second']:.1f}" if r.get("equal") else "tokens differ" if r else "-"


def _ratio(r: Report, name: str) -> str:
    if name not in r or not r["equal"]:
        return "-"
    low, high = r.get(f"{name}_low"), r.get(f"{name}_high")
    return f"{r[name]:.2f}x" + ("" if low is None else f" ({low:.2f}-{high:.2f})")
