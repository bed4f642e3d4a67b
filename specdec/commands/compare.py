"""``specdec compare``: what changed between two bench reports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from specdec.commands import console
from specdec.commands.options import JsonOption

if TYPE_CHECKING:
    from specdec.bench.changes import Change

STYLES = {"faster": "green", "slower": "red", "equality lost": "bold red", "equality gained": "green"}


def compare(
    a: Annotated[Path, typer.Argument(help="A report that specdec bench --json wrote.")],
    b: Annotated[Path, typer.Argument(help="Another, that is held against it.")],
    json_path: JsonOption = None,
    fail_on_slower: Annotated[
        bool, typer.Option("--fail-on-slower", help="Exit with 1 where something is slower, or no longer equal.")
    ] = False,
) -> None:
    """Say what changed from A to B beyond noise, and in what the two runs differ."""
    from specdec.bench.changes import changes, settings

    with console.told(ValueError, OSError):
        old, new = _read(a), _read(b)
        differing, found = settings(old, new), changes(old, new)
        if json_path:
            report = {"settings": differing, "changes": [asdict(change) for change in found]}
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    _show_settings(differing)
    console.show(_table(found))
    _show_count(found)
    if fail_on_slower and any(change.kind in ("slower", "equality lost") for change in found):
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for record in report["results"]:
            record["method"], record["workload"], record["equal"], record["baseline"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no report of specdec bench ({error!r})") from error
    return dict(report)


def _show_settings(differing: dict[str, tuple[Any, Any]]) -> None:
    if not differing:
        console.output.print("The same machine, versions and settings.")
        return
    table = Table("the runs differ in", "A", "B", box=None)
    for name, (old, new) in differing.items():
        table.add_row(name, str(old), str(new))
    console.show(table)
    console.output.print()


def _table(found: list[Change]) -> Table:
    table = Table("method", "workload", "speedup A", "speedup B", "B / A", "interval", "", box=None)
    for change in found:
        speeds = (_number(value) for value in (change.before, change.after, change.ratio))
        interval = "" if change.low is None else f"{change.low:.2f} to {change.high:.2f}"
        kind = f"{change.kind}: {change.why}" if change.why else change.kind
        table.add_row(change.method, change.workload, *speeds, interval, kind, style=STYLES.get(change.kind))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _show_count(found: list[Change]) -> None:
    judged = [change for change in found if change.ratio is not None]
    changed = sum(change.kind != "within noise" for change in judged)
    console.output.print(f"{changed} of {len(judged)} compared speeds changed beyond noise.", highlight=False)
