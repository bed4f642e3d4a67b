"""What Token Recycling has learnt, as a file, and whether a file holds that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from specdec import storage

KIND, VERSION = "recycling", 1


def write(path: str | os.PathLike[str], k: int, matrices: Mapping[str, np.ndarray], **counts: np.ndarray) -> None:
    """Write matrices by namespace, and counts, to ``path``; a reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written. What was there stays.
    """
    arrays = {f"matrix.{i}": matrix for i, matrix in enumerate(matrices.values())} | counts
    vocab = max(map(len, matrices.values()), default=0)
    storage.write(path, KIND, VERSION, arrays, {"k": k, "vocab": vocab, "namespaces": list(matrices)})


def read(path: str | os.PathLike[str], k: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Matrices by namespace, least recently used first, and counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, version or ``k``, or it is damaged.
    """
    arrays, facts = storage.read(path, KIND, VERSION)
    if facts.get("k") != k:
        raise ValueError(f"{path} holds {facts.get('k')} candidates per token, this drafter keeps k={k}")
    names: list[Any] = facts.get("namespaces", [])
    if set(arrays) != {f"matrix.{i}" for i in range(len(names))} | {"accepted", "offered"}:
        raise ValueError(f"{path} holds {sorted(arrays)}, not a matrix for each of {len(names)} namespaces and counts")
    matrices = {name: arrays.pop(f"matrix.{i}") for i, name in enumerate(names)}
    for name, matrix in matrices.items():
        _check(path, name, matrix, k)
    return matrices, arrays


def _check(path: str | os.PathLike[str], name: str, matrix: np.ndarray, k: int) -> None:
    """A checksum tells accidents, not intent: no entry may point outside the matrix."""
    if matrix.dtype != np.int32 or matrix.ndim != 2 or matrix.shape[1] != k:
        raise ValueError(
            f"{path}: the matrix of namespace {name!r} is {matrix.dtype} {matrix.shape}, not int32 [V, {k}]"
        )
    if matrix.size and not -1 <= matrix.min() <= matrix.max() < len(matrix):
        raise ValueError(f"{path}: the matrix of namespace {name!r} has tokens outside -1 to {len(matrix) - 1}")
