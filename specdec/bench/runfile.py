"""Finished runs in a file, so that a comparison that was interrupted can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.measure import Run

VERSION = 1
Record = dict[str, Any]


class RunFile:
    """A JSONL file: what is compared in its first line, then the prompts, runs, probes and rivals that do not run.

    Each line is written whole and at once. ``done`` says that nothing is left to do; such a file is not gone on with.

    Args:
        path: the file.
        identity: what must be the same for runs to belong together: model, prompts, methods, machine, versions.
        fresh: whether to begin anew whatever is there.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it holds unfinished runs of another comparison, or is no such file.
    """

    def __init__(self, path: Path, identity: Record, fresh: bool = False) -> None:
        self.path = path
        self.records: list[Record] = [] if fresh or not path.exists() else list(_read(path))
        if not self.records or self.records[-1]["type"] == "done":
            self.records = []
            path.write_text("")
            self.write("bench", version=VERSION, identity=identity)
            return
        _check(path, self.records.pop(0), identity)
        _cut(path)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"type": kind, **values}) + "\n")

    def write_run(self, method: str, prompt: int, run: Run) -> None:
        """Append a run."""
        self.write("run", method=method, prompt=prompt, **asdict(run))

    def of(self, kind: str) -> list[Record]:
        """What was there of one kind, in order, without its type."""
        return [{key: r[key] for key in r if key != "type"} for r in self.records if r["type"] == kind]

    def runs(self) -> list[tuple[str, int, Run]]:
        """The runs that were there: method, prompt, and what was measured."""
        return [(r.pop("method"), r.pop("prompt"), Run(**r)) for r in self.of("run")]


def _read(path: Path) -> Iterator[Record]:
    """Every whole line; the last may have been cut by a kill."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["type"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a run of specdec bench ({error!r})") from error
        yield record


def _cut(path: Path) -> None:
    """Take away what was not written whole."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def _check(path: Path, first: Record, identity: Record) -> None:
    if first.get("version") != VERSION:
        raise ValueError(f"{path}: not runs of this version of specdec bench; --fresh begins anew")
    before = first["identity"]
    now = json.loads(json.dumps(identity))
    for key in now | before:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{path} holds unfinished runs of another comparison: {key} was {_brief(before.get(key))} and is now "
                f"{_brief(now.get(key))}; --fresh begins anew"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:97]}..."
