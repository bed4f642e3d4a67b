"""Arrays and facts in one safetensors file, which is replaced whole or not at all and knows when it is damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "specdec"
Arrays = dict[str, np.ndarray]


def write(
    path: str | os.PathLike[str], kind: str, version: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Put ``arrays`` and ``facts`` into ``path``; whoever reads it, at any moment, sees the old file or the new one.

    Writers of one path, in any process, take turns; the empty file ``.NAME.lock`` beside it, by which they do, stays.

    Args:
        kind: what the file is for; only a reader of the same kind takes it.
        version: of that kind's content.
        facts: whatever JSON can say.

    Raises:
        OSError: the file cannot be written. What was there stays.
        TypeError: a fact that JSON cannot say.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {"format": FORMAT, "kind": kind, "version": str(version), "facts": json.dumps(dict(facts))}
    metadata["sha256"] = _checksum(arrays, metadata)
    path = Path(path).resolve()  # a link goes on pointing at what it pointed at
    # Under the lock one name serves every writer, so what a killed one left is overwritten and moved by the next.
    temporary = path.with_name(f".{path.name}.partial")
    with FileLock(path.with_name(f".{path.name}.lock")):
        try:
            save_file(arrays, temporary, metadata)
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":  # elsewhere a directory cannot be opened
            _flush(path.parent)


def read(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and facts that ``write`` put into ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``write`` did not make it, it is of another kind or version, or it is damaged.
    """
    arrays, metadata = _content(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of specdec: its format is {metadata.get('format')!r}")
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} is a file of kind {metadata.get('kind')!r}, wanted is {kind!r}")
    if metadata.get("version") != str(version):
        raise ValueError(f"{path} has version {metadata.get('version')!r}, this program reads version {version}")
    if metadata.get("sha256") != _checksum(arrays, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return arrays, json.loads(metadata.get("facts", ""))


def _content(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two for types that numpy does not have
        raise ValueError(f"{path} is no safetensors file, or it is damaged: {error}") from error


def _flush(path: Path) -> None:
    """Wait until the disk has it, so that no later change can reach the disk before."""
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    digest = hashlib.sha256(json.dumps([said, shapes], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()
