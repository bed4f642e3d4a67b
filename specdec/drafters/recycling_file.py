"""What Token Recycling has learnt, as a file: safetensors with a version and a checksum, replaced at once or not."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT, VERSION = "specdec.recycling", "1"


def write(path: str | os.PathLike[str], k: int, matrices: Mapping[str, np.ndarray], **counts: np.ndarray) -> None:
    """Write matrices by namespace, and counts, to ``path``; a reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written. What was there stays.
    """
    tensors = {f"matrix.{i}": matrix for i, matrix in enumerate(matrices.values())} | counts
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "k": str(k),
        "vocab": str(max(map(len, matrices.values()), default=0)),
        "namespaces": json.dumps(list(matrices)),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    handle, temporary = tempfile.mkstemp(dir=Path(path).resolve().parent, prefix=".recycling-")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str], k: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Matrices by namespace, least recently used first, and counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, version or ``k``, or it is damaged.
    """
    tensors, metadata = _tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of RecyclingDrafter.save: its format is {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')!r}, this program reads version {VERSION!r}")
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    if metadata.get("k") != str(k):
        raise ValueError(f"{path} holds {metadata.get('k')} candidates per token, this drafter keeps k={k}")
    names = json.loads(metadata.get("namespaces", "[]"))
    if set(tensors) != {f"matrix.{i}" for i in range(len(names))} | {"accepted", "offered"}:
        raise ValueError(f"{path} holds {sorted(tensors)}, not a matrix for each of {len(names)} namespaces and counts")
    matrices = {name: tensors.pop(f"matrix.{i}") for i, name in enumerate(names)}
    for name, matrix in matrices.items():
        _check(path, name, matrix, k)
    return matrices, tensors


def _tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: np.array(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or it is cut short: {error}") from error


def _check(path: str | os.PathLike[str], name: str, matrix: np.ndarray, k: int) -> None:
    """A checksum tells accidents, not intent: no entry may point outside the matrix."""
    if matrix.dtype != np.int32 or matrix.ndim != 2 or matrix.shape[1] != k:
        raise ValueError(
            f"{path}: the matrix of namespace {name!r} is {matrix.dtype} {matrix.shape}, not int32 [V, {k}]"
        )
    if matrix.size and not -1 <= matrix.min() <= matrix.max() < len(matrix):
        raise ValueError(f"{path}: the matrix of namespace {name!r} has tokens outside -1 to {len(matrix) - 1}")


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "checksum"}).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
