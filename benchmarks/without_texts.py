"""A report of ``specdec bench`` for others to see, without the texts that it was measured on.

    python benchmarks/without_texts.py REPORT.json "whose questions, and which" --json benchmarks/results/some.json

Questions that may be read but not passed on, answers to them, and the words in which answers differ are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

TEXTS = ("questions", "outputs", "differences")


def main(report: Path, source: str, json_path: Annotated[Path, typer.Option("--json")]) -> None:
    """Write the report without texts. Exits with a message where tokens differed: that is to be looked into first."""
    read = json.loads(report.read_text())
    if read["differences"]:
        raise typer.BadParameter(f"{report}: tokens differed; see its 'differences'")
    kept = {name: value for name, value in read.items() if name not in TEXTS}
    json_path.write_text(json.dumps({**kept, "differences": [], "source": source}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
