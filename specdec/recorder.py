"""Generations written to a trace file while they happen; docs/trace.md says how, ``trace`` reads them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from specdec.spelling import spell
from specdec.trace import VERSION, read_header

NUMBER = re.compile(rb'^\{"type": ?"generation", ?"id": ?(\d+)')


class Recorder:
    """Appends generations to a JSONL file; a trace that is there already goes on.

    Threads may share a recorder, and recorders of any process a file: lines are written whole, and generations
    numbered in turn, by the lock ``.NAME.lock`` beside the file. No file is held open between writes.

    Args:
        path: is made where there is none.
        label: of its generations: what they are for.
        tokenizer: of Hugging Face; with it the texts of all tokens are written too.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file is there, and no trace of this version.
    """

    def __init__(self, path: str | Path, label: str = "", tokenizer: Any = None) -> None:
        self.path, self.label, self.tokenizer = Path(path), label, tokenizer
        self._spelt: set[int] = set()
        self._mutex, self._turn = threading.Lock(), FileLock(self.path.with_name(f".{self.path.name}.lock"))
        self._seen = self._next = 0  # bytes looked through for generations, and the number of the next
        with self.path.open("a+b") as file, self._turn:
            file.seek(0)
            if first := file.readline():
                read_header(first, f"{self.path}, line 1")
            self._look()
            file.truncate(self._seen)  # a line that a killed process did not finish

    def begin(self, model: str, facts: Mapping[str, Any]) -> int:
        """Write a generation's first line, the file's own before it where there is none; return its number."""
        with self._mutex, self._turn:
            self._look()
            number, lines = self._next, []
            if not self._seen:
                from specdec import __version__

                lines.append({"type": "trace", "version": VERSION, "specdec": __version__, "model": model})
            lines.append({"type": "generation", "id": number, **facts, "label": self.label, "model": model})
            self._append(lines)
        return number

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, all at once."""
        with self._mutex:
            self._append(lines)

    def texts(self, ids: Iterable[int]) -> None:
        """Write the texts of those tokens whose texts this recorder has not written; nothing without a tokenizer."""
        if self.tokenizer is None:
            return
        with self._mutex:
            new = sorted(set(ids) - self._spelt)
            if new:
                texts, parts = spell(self.tokenizer, new)
                self._append(
                    [{"type": "texts", "texts": texts, "bytes": {id: part.hex() for id, part in parts.items()}}]
                )
            self._spelt.update(new)

    def _look(self) -> None:
        """See which numbers are taken; start anew where the file has been taken away."""
        if not self.path.exists() or self.path.stat().st_size < self._seen:
            self._seen = self._next = 0
            self._spelt.clear()
        with self.path.open("a+b") as file:
            file.seek(self._seen)
            for line in file:
                if line.endswith(b"\n"):
                    self._seen += len(line)
                if match := NUMBER.match(line):
                    self._next = max(self._next, int(match[1]) + 1)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        block = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        with self.path.open("ab", buffering=0) as file:  # one write: lines of others never come between
            if file.write(block) != len(block):
                raise OSError(f"{self.path} takes no more")


def recorder(trace: str | Path | Recorder) -> Recorder:
    """The recorder itself, or one of the file that is named."""
    return trace if isinstance(trace, Recorder) else Recorder(trace)
