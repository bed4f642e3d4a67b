"""A corpus as an index on disk: a token store and its suffix array, built once, mapped by any number of processes.

An index is a directory of three files: ``tokens`` (int32, little-endian, a separator after each document),
``suffixes`` (the positions of all other tokens in the order of the text from there on; int32, or int64 from 2**31
tokens on) and ``header.json`` (version, sizes, checksums, and a checksum of all that).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

FORMAT, VERSION = "specdec.corpus", 1
SEPARATOR = -1  # no token: so no match and no continuation crosses from one document into the next

Source = str | os.PathLike[str] | Sequence[int] | Int[np.ndarray, " length"]
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """An opened index: read-only, mapped and not loaded, so that processes share one copy and opening takes no time.

    Attributes:
        path: its directory.
        tokens: all documents' tokens, ``SEPARATOR`` after each document.
        suffixes: positions in ``tokens``, sorted by the tokens from there on.
        documents: how many there are.
        tokenizer: the name of the tokenizer that made the tokens, "" if they came as tokens.
    """

    path: Path
    tokens: Int[np.ndarray, " positions"]
    suffixes: Int[np.ndarray, " suffixes"]
    documents: int
    tokenizer: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Corpus:
        """Map the index in the directory ``path``.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: it is of another version, cut short, or its header was altered.
        """
        directory = Path(path)
        header = _header(directory)
        tokens, suffixes = (_mapped(directory / name, header["files"][name]) for name in ("tokens", "suffixes"))
        return cls(directory, tokens, suffixes, header["documents"], header["tokenizer"])

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            ValueError: a file does not hold what was written.
        """
        for name, facts in _header(self.path)["files"].items():
            if _digest(self.path / name) != facts["sha256"]:
                raise ValueError(f"{self.path / name} is damaged: its checksum does not fit; build the index again")


def build(
    corpus: Iterable[Source],
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Corpus:
    """Index documents in a new directory ``out``, which appears whole or not at all.

    The suffix array is sorted by libdivsufsort; that takes about 20 bytes of memory per token.

    Args:
        corpus: documents as token ids, and paths: a ``.jsonl`` file has a document a line, a string or an object with
            a string ``text`` or ``content``, with ``messages`` (a document each) or with a ``response``; any other
            file is one document of UTF-8 text.
        out: where the index shall be.
        tokenizer: turns text into tokens: anything with ``encode(text, add_special_tokens=False)``.
        progress: told what is being done, "reading" or "sorting", and how many tokens there are so far.

    Raises:
        FileExistsError: there is something at ``out``.
        ValueError: no tokens; text but no tokenizer; a token below 0 or above 2**31 - 1; a line that is no document.
        ImportError: the package pydivsufsort is missing.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or choose another place for the index")
    divsufsort = _divsufsort()
    tell = progress or (lambda stage, tokens: None)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".corpus-") as scratch:
        work = Path(scratch, "index")
        work.mkdir()
        documents = _write_tokens(work / "tokens", _documents(corpus, tokenizer), tell)
        tokens = np.fromfile(work / "tokens", "<i4")
        tell("sorting", len(tokens))
        suffixes = divsufsort(tokens)[documents:]  # the separators' own come first
        suffixes.astype("<i4" if len(tokens) < 2**31 else "<i8", copy=False).tofile(work / "suffixes")
        _write_header(work, documents, len(tokens), str(getattr(tokenizer, "name_or_path", "")))
        os.rename(work, out)
    return Corpus.open(out)


def _divsufsort() -> Any:
    try:
        return import_module("pydivsufsort").divsufsort
    except ImportError as error:
        raise ImportError("building an index needs pydivsufsort: pip install pydivsufsort") from error


def _documents(corpus: Iterable[Source], tokenizer: Any) -> Iterator[np.ndarray]:
    """Each document's tokens."""
    for source in [corpus] if isinstance(corpus, str | os.PathLike) else corpus:
        if not isinstance(source, str | os.PathLike):
            yield np.asarray(source)
            continue
        if tokenizer is None:
            raise ValueError(f"{source} is text: build needs a tokenizer to turn it into tokens")
        for text in _texts(Path(source)):
            yield np.asarray(tokenizer.encode(text, add_special_tokens=False))


def _texts(path: Path) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8")
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _row(line, f"{path}, line {number}")


def _row(line: str, place: str) -> list[str]:
    """The documents of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    texts: list[Any] = [row]
    if isinstance(row, dict):
        messages = row.get("messages", [])
        texts = [row[key] for key in ("text", "content", "response") if key in row][:1]
        texts = texts or [message.get("content") or "" for message in messages]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{place} is neither a string nor an object with "text", "content", "messages" or "response"')
    return texts


def _write_tokens(path: Path, documents: Iterable[np.ndarray], tell: Progress) -> int:
    """Write the documents that are not empty, each with its separator, and return how many they are."""
    count = written = 0
    with path.open("wb") as file:
        for tokens in documents:
            if not tokens.size:
                continue
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**31:
                raise ValueError(f"document {count} is not a row of token ids from 0 to 2**31 - 1")
            file.write(np.append(tokens.astype("<i4"), np.int32(SEPARATOR)).tobytes())
            count, written = count + 1, written + len(tokens) + 1
            tell("reading", written)
    if not count:
        raise ValueError("the corpus has no tokens: there is nothing to index")
    return count


def _write_header(work: Path, documents: int, tokens: int, tokenizer: str) -> None:
    files = {
        name: {"items": items, "bytes": (work / name).stat().st_size, "sha256": _digest(work / name)}
        for name, items in (("tokens", tokens), ("suffixes", tokens - documents))
    }
    header = {"format": FORMAT, "version": VERSION, "documents": documents, "tokenizer": tokenizer, "files": files}
    header["checksum"] = _checksum(header)
    (work / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _header(directory: Path) -> dict[str, Any]:
    path = directory / "header.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no index in {directory}: it has no header.json")
    try:
        header = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not the header of an index")
    if header.get("version") != VERSION:
        raise ValueError(f"{directory} has version {header.get('version')!r}, this program reads version {VERSION}")
    if header.get("checksum") != _checksum(header):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; build the index again")
    return header


def _mapped(path: Path, facts: dict[str, Any]) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"the index lacks its file {path}: build it again")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise ValueError(f"{path} has {size} bytes, its header says {facts['bytes']}: build the index again")
    dtype = f"<i{size // facts['items']}"
    return np.asarray(np.memmap(path, dtype, mode="r"))  # a plain view: subclasses are slow to hand to kernels


def _checksum(header: dict[str, Any]) -> str:
    content = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
