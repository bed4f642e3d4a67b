"""A memory as a file, and what of one memory can be entered in another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Int

from specdec import storage
from specdec.core import Drafter
from specdec.drafters import MergedDrafter, RecyclingDrafter, SuffixDrafter, recycling_file, suffix_file

KIND, VERSION = "memory", 1


def write(path: str | os.PathLike[str], drafter: Any, namespaces: Sequence[str]) -> None:
    """Save a drafter's own file and the order of namespaces as one file, which changes at once or not at all."""
    _check(drafter)
    with TemporaryDirectory() as folder:
        drafter.save(Path(folder, "drafter"))
        content = np.fromfile(Path(folder, "drafter"), np.uint8)
    storage.write(path, KIND, VERSION, {"drafter": content}, {"namespaces": list(namespaces)})


def read(path: str | os.PathLike[str], drafter: Any) -> list[str]:
    """Load a drafter from what ``write`` saved; the namespaces. On an error the drafter stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another drafter.
    """
    _check(drafter)
    arrays, facts = storage.read(path, KIND, VERSION)
    with TemporaryDirectory() as folder:
        arrays["drafter"].tofile(Path(folder, "drafter"))
        drafter.load(Path(folder, "drafter"))
    return list(facts["namespaces"])


def _check(drafter: Any) -> None:
    if not hasattr(drafter, "save"):
        raise TypeError(f"drafter {drafter.name} learns nothing that can be saved")


def responses(drafter: Drafter) -> Iterator[tuple[str, Int[np.ndarray, " length"]]]:
    """Every past response that a drafter, or a part of it, keeps whole, with its namespace."""
    for part in _parts(drafter):
        if isinstance(part, SuffixDrafter):
            with TemporaryDirectory() as folder:
                part.save(Path(folder, "suffix"))
                contents = suffix_file.read(Path(folder, "suffix"))
            for namespace, (tokens, _, _) in contents.items():
                for piece in np.split(tokens, np.flatnonzero(tokens < 0)):
                    yield namespace, piece[piece >= 0]


def merge_candidates(drafter: Drafter, other: Drafter) -> list[str]:
    """Give a drafter's recycling part the rows that it lacks and another's has; the namespaces concerned."""
    namespaces: list[str] = []
    for ours, theirs in zip(_recycling(drafter), _recycling(other), strict=False):
        with TemporaryDirectory() as folder:
            mine, more = Path(folder, "ours"), Path(folder, "theirs")
            ours.save(mine)
            theirs.save(more)
            matrices, counts = recycling_file.read(mine, ours.k)
            for namespace, matrix in recycling_file.read(more, ours.k)[0].items():
                matrices[namespace] = _filled(matrices.get(namespace, matrix[:0]), matrix)
                namespaces.append(namespace)
            recycling_file.write(mine, ours.k, matrices, **counts)
            ours.load(mine)
    return namespaces


def unmerged(drafter: Drafter, other: Drafter) -> tuple[str, ...]:
    """The other's parts whose learning neither ``responses`` nor ``merge_candidates`` hands on."""
    text = any(isinstance(part, SuffixDrafter) for part in _parts(other))
    left = [part for part in _parts(other) if hasattr(part, "save") and not isinstance(part, SuffixDrafter)]
    if _recycling(drafter):
        left = [part for part in left if not isinstance(part, RecyclingDrafter)]
    return tuple(part.name for part in left if isinstance(part, RecyclingDrafter) or not text)


def _filled(matrix: np.ndarray, more: np.ndarray) -> np.ndarray:
    """A matrix of candidates with ``more``'s rows where it has none."""
    whole = np.full((max(len(matrix), len(more)), more.shape[1]), -1, np.int32)
    whole[: len(more)] = more
    known = np.flatnonzero(matrix[:, 0] >= 0)
    whole[known] = matrix[known]
    return whole


def _parts(drafter: Drafter) -> Sequence[Drafter]:
    return drafter.drafters if isinstance(drafter, MergedDrafter) else (drafter,)


def _recycling(drafter: Drafter) -> list[RecyclingDrafter]:
    return [part for part in _parts(drafter) if isinstance(part, RecyclingDrafter)]
