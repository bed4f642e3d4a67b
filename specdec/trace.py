"""What happened in generations, step by step, read from the files that a ``Recorder`` writes; see docs/trace.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec import spelling

VERSION = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the target over one row's tree, parents first, the root being the last committed token.

    Attributes:
        row: of the batch.
        tokens, parents, probability, source: of each node, as in ``DraftTree``.
        path: the accepted nodes, root first.
        committed: the accepted tokens, and the target's own after them; what a stopping rule cut off is not there.
        wanted: the target's most likely next tokens after each node, best first; empty where not recorded.
        wanted_probability: the target's probability of each, before logits processors and temperature.
        seconds: of draft, verify, walk and cache; a step of several rows has the same in each row.
        prompt: whether it is the prompt's own pass, in which nothing is guessed.
    """

    row: int
    tokens: list[int]
    parents: list[int]
    probability: list[float]
    source: list[str]
    path: list[int]
    committed: list[int]
    wanted: list[list[int]]
    wanted_probability: list[list[float]]
    seconds: dict[str, float]
    prompt: bool = False

    @property
    def guessed_by(self) -> list[str]:
        """The drafter that guessed each committed token; "" for the target's own.

        The last token is no node's of the path, but may have been guessed all the same where a rule stops there.
        """
        drafters = [self.source[node] for node in self.path[1:]]
        return [*drafters, self._drafter_of(self.path[-1], self.committed[-1])] if self.committed else []

    def _drafter_of(self, parent: int, token: int) -> str:
        nodes = zip(self.parents, self.tokens, self.source, strict=True)
        return next((drafter for above, guess, drafter in nodes if (above, guess) == (parent, token)), "")


@dataclass(slots=True)
class Generation:
    """One call of ``generate``.

    Attributes:
        id: its number in the file.
        prompts: token ids of each row, without padding.
        drafter, policy, verifier, level, label, model: what it ran with, and what for.
        steps: of all rows, in order.
        seconds: from the prompt to the end; None where the recording stops before.
    """

    id: int
    prompts: list[list[int]]
    drafter: str = ""
    policy: str = ""
    verifier: str = ""
    level: str = ""
    label: str = ""
    model: str = ""
    steps: list[Step] = field(default_factory=list)
    seconds: float | None = None

    def of_row(self, row: int) -> list[Step]:
        """The steps of one row."""
        return [step for step in self.steps if step.row == row]

    def output(self, row: int = 0) -> list[int]:
        """The tokens that were committed to a row after its prompt."""
        return [token for step in self.of_row(row) for token in step.committed]


@dataclass(slots=True)
class Trace:
    """A trace file's content.

    Attributes:
        model, specdec: of the first generation's process.
        generations: in order of their starts.
        texts: what single tokens say; ``parts``: the bytes of those that are no whole characters.
    """

    model: str
    specdec: str
    generations: list[Generation] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    parts: dict[int, bytes] = field(default_factory=dict)

    def text(self, token: int) -> str:
        """What a token says; its id in angle brackets where that is not known. Half a character shows its bytes."""
        part = self.parts.get(token)
        return self.texts.get(token, f"<{token}>") if part is None else part.decode(errors="backslashreplace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each token adds to a text, a character spread over several coming with the last; joined, the text."""
        return spelling.pieces(ids, self.texts, self.parts)

    def with_texts(self, tokenizer: Any) -> Trace:
        """The same trace with the texts that a tokenizer of Hugging Face gives its tokens."""
        texts, parts = spelling.spell(tokenizer, sorted(self._ids()))
        return Trace(self.model, self.specdec, self.generations, texts, parts)

    def _ids(self) -> set[int]:
        ids: set[int] = set()
        for generation in self.generations:
            ids.update(*generation.prompts)
            for step in generation.steps:
                ids.update(step.tokens, step.committed, *step.wanted)
        return ids


def read_trace(path: str | Path) -> Trace:
    """A trace file; what a killed process did not finish writing, its last line, is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no trace, of another version, or damaged; the message names file and line.
    """
    lines = _lines(Path(path))
    where, first = next(lines, (f"{path}", b""))
    header = read_header(first, where)
    trace, known = Trace(str(header.get("model", "")), str(header.get("specdec", ""))), dict[int, Generation]()
    for where, line in lines:
        try:
            _add(trace, known, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: damaged: {error!r}") from error
    trace.generations = list(known.values())
    return trace


def read_header(line: bytes, where: str) -> dict[str, Any]:
    """A trace's first line.

    Raises:
        ValueError: it is none, or of another version; the message begins with ``where``.
    """
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("type") != "trace":
        raise ValueError(f"{where}: not a trace: it begins {line[:40]!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"{where}: a trace of version {header.get('version')!r}; this program reads {VERSION}")
    return header


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Whole lines, and where each is."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and line.strip():
                yield f"{path}, line {number}", line


def _add(trace: Trace, known: dict[int, Generation], entry: dict[str, Any]) -> None:
    """Take in one line; kinds that are not known are passed over, for files of later programs."""
    match entry["type"]:
        case "generation":
            known[entry["id"]] = Generation(**_fields(Generation, entry))
        case "step":
            step = Step(**_fields(Step, entry))
            _check(step)
            known[entry["generation"]].steps.append(step)
        case "end":
            known[entry["generation"]].seconds = float(entry["seconds"])
        case "texts":
            trace.texts |= {int(id): str(text) for id, text in entry["texts"].items()}
            trace.parts |= {int(id): bytes.fromhex(part) for id, part in entry.get("bytes", {}).items()}


def _fields(kind: Any, entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in kind.__dataclass_fields__ if name in entry}


def _check(step: Step) -> None:
    n = len(step.tokens)
    sizes: Sequence[Sequence[Any]] = (step.parents, step.probability, step.source)
    if not n or any(len(each) != n for each in sizes) or any(len(each) not in (0, n) for each in (step.wanted,)):
        raise ValueError(f"{n} nodes with {[len(each) for each in sizes]} parents, probabilities and sources")
    if any(not -1 <= parent < node for node, parent in enumerate(step.parents)) or step.parents[0] != -1:
        raise ValueError("a node stands before its parent")
    if any(not 0 <= node < n for node in step.path):
        raise ValueError(f"the path {step.path} leaves the tree of {n} nodes")
