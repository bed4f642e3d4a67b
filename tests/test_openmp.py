"""Helper threads of OpenMP, as the system counts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec import openmp

HELPERS = """
import os, time, torch
from specdec import openmp

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
torch.ones(1000, 1000).sum()
working = threads()
openmp.release()
for _ in range(6000):  # they end when the system lets them
    if threads() == before:
        break
    time.sleep(0.01)
left = threads()
print(working - before, left - before, float(torch.ones(1000, 1000).sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by /proc")
def test_a_threads_helpers_end_and_come_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    shown = subprocess.run([sys.executable, "-c", HELPERS], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.split() == ["2", "0", "1000000.0"]


NUMBA = """
import torch
from specdec.kernels import linear_numba

linear_numba.use_threads(torch.get_num_threads())
print(torch.get_num_threads())
"""


def test_numba_leaves_torch_its_number_of_threads() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    shown = subprocess.run([sys.executable, "-c", NUMBA], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.split() == ["1"]


def test_where_there_is_no_proc_nothing_happens(tmp_path: Path) -> None:
    openmp.release(tmp_path / "maps")


def test_only_libraries_of_openmp_are_found() -> None:
    maps = "7f0-7f1 r-xp 0 0:0 1  /a b\n7f2-7f3 r 0 /x/libgomp-6a29.so.1.0.0\n7f4 /y/libiomp5.so\n7f5 /z/libcomp.so\n"
    assert openmp.LIBRARY.findall(maps) == ["/x/libgomp-6a29.so.1.0.0", "/y/libiomp5.so"]


WORKQUEUE = """
import torch
from specdec import cpu

model = torch.nn.Sequential(torch.nn.Linear(64, 64))
print(cpu.install(model), "forward" in vars(model[0]))
"""


def test_threads_that_would_abort_the_process_are_not_used() -> None:
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    command = [sys.executable, "-c", WORKQUEUE]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert shown.startswith("no CPU kernels: numba's threading layer is 'workqueue'")
    assert shown.endswith("unset NUMBA_THREADING_LAYER, or set it to omp or tbb False\n")
