"""Reports of drafters that are models."""

from __future__ import annotations

from pathlib import Path

from tables.markdown import Report, check_quiet, machine, read, table


def drafts(directory: Path) -> str:
    """What benchmarks/drafts.py found, in Markdown."""
    return "\n\n".join(map(_drafts_section, read(directory, "drafts"))) or "not measured yet"


def _drafts_section(report: Report) -> str:
    """One table of each temperature and number of prompts at once."""
    check_quiet(report)
    tables = [
        f"{machine(report['machine'])}; {report['prompts']} prompts, at most {report['max_new_tokens']} tokens. In "
        "brackets 95% intervals:"
    ]
    for rows, temperature in dict.fromkeys((r["rows"], r["temperature"]) for r in report["drafts"]):
        shown = [r for r in report["drafts"] if (r["rows"], r["temperature"]) == (rows, temperature)]
        cells = [[r["method"], f"{r['tokens_per_step']:.2f}", *_draft_cells(r)] for r in shown]
        names = ["method", "tokens per step", "tokens per second", "over plain", "over assisted"]
        tables.append(f"Temperature {temperature:g}, {rows} at once:\n\n{table(names, cells)}")
    return "\n\n".join(tables)


def _draft_cells(r: Report) -> list[str]:
    if not r["equal"]:
        return ["tokens differ", "", ""]
    ratios = [_ratio(r, name) for name in ("speedup", "over_assisted")]
    return [f"{r['tokens_per_second']:.1f}", *ratios]


def _ratio(r: Report, name: str) -> str:
    if name not in r:
        return "-"
    low, high = r.get(f"{name}_low"), r.get(f"{name}_high")
    return f"{r[name]:.2f}x" + ("" if low is None else f" ({low:.2f}-{high:.2f})")
