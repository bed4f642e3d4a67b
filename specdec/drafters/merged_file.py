"""One file for what several drafters have learnt: each one's own file, packed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from specdec import storage
from specdec.core import Drafter

KIND, VERSION = "merged", 1


def write(path: str | os.PathLike[str], drafters: Sequence[Drafter]) -> None:
    """Save the drafters that can be saved to one file, which changes at once or, on OSError, not at all."""
    with TemporaryDirectory() as folder:
        packed = {name: np.fromfile(file, np.uint8) for name, file in _saved(Path(folder), drafters).items()}
    storage.write(path, KIND, VERSION, packed, {"drafters": [drafter.name for drafter in drafters]})


def read(path: str | os.PathLike[str], drafters: Sequence[Drafter]) -> None:
    """Load what ``write`` saved of the same drafters; on an error none of them changes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of other drafters, or not to one's liking.
    """
    packed, facts = storage.read(path, KIND, VERSION)
    names = [drafter.name for drafter in drafters]
    if facts.get("drafters") != names:
        raise ValueError(f"{path} is of the drafters {facts.get('drafters')}, these are {names}")
    with TemporaryDirectory() as folder, TemporaryDirectory() as before:
        known = _saved(Path(before), drafters)
        files = {name: Path(folder, name) for name in packed if name in known}
        for name, file in files.items():
            packed[name].tofile(file)
        try:
            _load(files, drafters)
        except ValueError:
            _load(known, drafters)
            raise


def _saved(folder: Path, drafters: Sequence[Any]) -> dict[str, Path]:
    """A file for each drafter that can be saved, by its place among them."""
    files = {str(i): folder / str(i) for i, drafter in enumerate(drafters) if hasattr(drafter, "save")}
    for place, file in files.items():
        drafters[int(place)].save(file)
    return files


def _load(files: dict[str, Path], drafters: Sequence[Any]) -> None:
    for place, file in files.items():
        drafters[int(place)].load(file)
