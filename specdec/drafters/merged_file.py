"""One file for what several drafters have learnt: each one's own file, packed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from specdec import storage
from specdec.calibration import Acceptance
from specdec.core import Drafter

KIND, VERSION = "merged", 2
RATES = "rates"


def write(path: str | os.PathLike[str], drafters: Sequence[Drafter], rates: Sequence[Acceptance]) -> None:
    """Save the drafters that can be saved, and rates, to one file, which changes at once or, on OSError, not at all."""
    with TemporaryDirectory() as folder:
        packed = {name: np.fromfile(file, np.uint8) for name, file in _packed(Path(folder), drafters, rates).items()}
    storage.write(path, KIND, VERSION, packed, {"drafters": [drafter.name for drafter in drafters]})


def read(path: str | os.PathLike[str], drafters: Sequence[Drafter], rates: Sequence[Acceptance]) -> None:
    """Load what ``write`` saved of the same drafters, and as many rates; on an error nothing changes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of other drafters, or not to one's liking.
    """
    packed, facts = storage.read(path, KIND, VERSION)
    names = [drafter.name for drafter in drafters]
    if facts.get("drafters") != names:
        raise ValueError(f"{path} is of the drafters {facts.get('drafters')}, these are {names}")
    with TemporaryDirectory() as folder, TemporaryDirectory() as before:
        known = _packed(Path(before), drafters, rates)
        files = {name: Path(folder, name) for name in packed if name in known}
        for name, file in files.items():
            packed[name].tofile(file)
        try:
            _load(files, drafters, rates)
        except ValueError:
            _load(known, drafters, rates)
            raise


def _packed(folder: Path, drafters: Sequence[Any], rates: Sequence[Acceptance]) -> dict[str, Path]:
    """A file for each drafter that can be saved, by its place among them, and for each of the rates."""
    files = {}
    for i, drafter in enumerate(drafters):
        if hasattr(drafter, "save"):
            files[str(i)] = folder / str(i)
            drafter.save(files[str(i)])
    for i, each in enumerate(rates):
        files[f"{RATES}{i}"] = folder / f"{RATES}{i}"
        each.save(files[f"{RATES}{i}"], KIND)
    return files


def _load(files: dict[str, Path], drafters: Sequence[Any], rates: Sequence[Acceptance]) -> None:
    for name, file in files.items():
        if name.startswith(RATES):
            rates[int(name.removeprefix(RATES))].load(file, KIND)
        else:
            drafters[int(name)].load(file)
