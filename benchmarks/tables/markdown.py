"""What the tables of all benchmarks are made with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def read(directory: Path, key: str) -> list[Report]:
    """Those with a key that only their kind has."""
    reports = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [report for report in reports if key in report]


def machine(m: dict[str, Any]) -> str:
    """What figures hold for."""
    return (
        f"{m['model']} ({m['parameters'] / 1e6:.0f}M parameters, {m['dtype']}, {m['attention']} attention) on "
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}"
    )


def check_quiet(report: Report) -> None:
    """Exit where other load disturbed the run: such figures are not for showing."""
    disturbance = report.get("disturbance", {})
    if disturbance.get("disturbed"):
        sys.exit(f"{report['machine']['model']}: measured beside other load, measure again: {disturbance['text']}")


def times(r: Report) -> str:
    """A speed over the baseline, where tokens are equal."""
    return f"{r['speedup']:.2f}x" if r["equal"] else "tokens differ"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
