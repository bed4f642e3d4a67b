"""Reports of drafters that learn from text."""

from __future__ import annotations

from pathlib import Path

from tables.markdown import Report, read, table


def suffix_table(directory: Path) -> str:
    """What benchmarks/suffix_cache.py and suffix_append.py found, in Markdown."""
    parts = [_replay_table(report) for report in read(directory, "replays")]
    parts += [_append_table(report["append"]) for report in read(directory, "append")]
    return "\n\n".join(parts) or "not measured yet"


def _replay_table(report: Report) -> str:
    """One line of each trace, one column of each player."""
    names = list(dict.fromkeys(r["who"] for r in report["replays"]))
    rows: dict[str, list[str]] = {}
    for r in report["replays"]:
        cell = f"{r['tokens_per_step']:.3f} / {r['us_per_token']:.1f} / {r['bytes_per_token']:.0f}"
        rows.setdefault(f"{r['trace']} ({r['tokens']} tokens)", []).append(cell)
    head = f"Tokens per step / microseconds per token / bytes per token, at most {report['nodes']} guesses per step:"
    return f"{head}\n\n{table(['trace', *names], [[trace, *cells] for trace, cells in rows.items()])}"


def _append_table(append: dict[str, list[Report]]) -> str:
    """One line of each limit of memory, one column of each million tokens."""
    millions = [f"{r['million']}" for r in next(iter(append.values()))]
    worked = all("cpu_us_per_token" in r for taken in append.values() for r in taken)
    time = "cpu_us_per_token" if worked else "us_per_token"
    rows = [
        [limit, *(f"{r[time]:.1f} / {r['bytes_per_token_held']:.0f}" for r in taken)] for limit, taken in append.items()
    ]
    head = (
        f"Microseconds{' of CPU time' if worked else ''} of appending a token, in each million of them / bytes of each "
        "that is held, by `max_bytes`:"
    )
    return f"{head}\n\n{table(['million', *millions], rows)}"
