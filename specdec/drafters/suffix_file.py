"""What SuffixDecoding has learnt, as a file: past responses by namespace, from which the trees are built again."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from specdec import storage
from specdec.drafters.suffix_draft_numba import KINDS

KIND, VERSION = "suffix", 1
PARTS = ("tokens", "accepted", "offered")
Content = tuple[np.ndarray, np.ndarray, np.ndarray]


def write(path: str | os.PathLike[str], contents: Mapping[str, Content]) -> None:
    """Write each namespace's responses, -1 behind each, and its counts; a reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written. What was there stays.
    """
    arrays = {
        f"{part}.{i}": array
        for i, content in enumerate(contents.values())
        for part, array in zip(PARTS, content, strict=True)
    }
    storage.write(path, KIND, VERSION, arrays, {"namespaces": list(contents)})


def read(path: str | os.PathLike[str]) -> dict[str, Content]:
    """Responses and counts by namespace, least recently used first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not written by ``write``, or it is damaged.
    """
    arrays, facts = storage.read(path, KIND, VERSION)
    names = facts.get("namespaces")
    if not isinstance(names, list) or set(arrays) != {f"{part}.{i}" for i in range(len(names)) for part in PARTS}:
        raise ValueError(f"{path} holds {sorted(arrays)}, not {', '.join(PARTS)} for each of the namespaces {names}")
    contents = {name: (arrays[f"tokens.{i}"], *_counts(arrays, i)) for i, name in enumerate(names)}
    for name, content in contents.items():
        _check(path, name, *content)
    return contents


def _counts(arrays: Mapping[str, np.ndarray], i: int) -> tuple[np.ndarray, np.ndarray]:
    return arrays[f"accepted.{i}"], arrays[f"offered.{i}"]


def _check(
    path: str | os.PathLike[str], name: str, tokens: np.ndarray, accepted: np.ndarray, offered: np.ndarray
) -> None:
    """A checksum tells accidents, not intent: what could not have been written is refused."""
    if tokens.dtype != np.int32 or tokens.ndim != 1 or tokens.min(initial=0) < -1:
        raise ValueError(f"{path}: the responses of namespace {name!r} are not a list of token ids")
    if any(counts.dtype != np.float64 or counts.shape != (KINDS,) for counts in (accepted, offered)):
        raise ValueError(f"{path}: the counts of namespace {name!r} are not float64 [{KINDS}]")
    if not np.all((accepted >= 0) & (accepted <= offered) & (offered > 0) & (offered < np.inf)):
        raise ValueError(f"{path}: the counts of namespace {name!r} are not possible")
