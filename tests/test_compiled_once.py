"""What numba compiles it keeps, so that the next process only loads it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher

import specdec

ROOT = Path(specdec.__file__).parent
MODULES = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*_numba.py")]
INLINE = "specdec.kernels.tile_numba"  # whose loops are compiled into what calls them
USED = """
import torch
from specdec.kernels.linear import linear
from specdec.kernels.linear_numba import _threaded

torch.set_num_threads(2)
linear(torch.ones(2, 64), torch.ones(8, 64), impl="numba")
print(_threaded.stats.cache_hits.total(), _threaded.stats.cache_misses.total())
"""


@pytest.mark.parametrize("name", sorted({*MODULES} - {INLINE}))
def test_all_compiled_functions_are_kept(name: str) -> None:
    made = {key: each for key, each in vars(import_module(name)).items() if isinstance(each, Dispatcher)}
    assert made
    assert [key for key, each in made.items() if not each._cache.cache_path] == []


def test_a_second_process_compiles_nothing() -> None:
    runs = [subprocess.run([sys.executable, "-c", USED], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[1].stdout == "1 0\n"
