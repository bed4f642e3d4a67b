"""Every Triton kernel compiled for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile_triton import TARGETS, compiled, interpret_without_gpu

interpret_without_gpu()  # other tests of this process may run kernels in Triton's interpreter

from tests.kernel_cases import CASES  # noqa: E402


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, target):
    case = CASES[name]
    result = compiled(case.kernel, case.signature, case.constants, target, **case.options)
    assert result.machine_code.startswith(b"\x7fELF")
    assert result.spills == 0
    assert 0 < result.registers <= 255


def test_rows_are_read_before_they_are_written():
    """Between a chunk's reads and its writes all threads of a program wait for each other."""
    case = CASES["move_rows"]
    assembly = compiled(case.kernel, case.signature, case.constants, "sm_90").assembly
    order = re.findall(r"ld\.global|bar\.sync|st\.global", assembly)
    last_read = len(order) - 1 - order[::-1].index("ld.global")
    assert "bar.sync" in order[last_read : order.index("st.global")]


@pytest.mark.slow
def test_the_page_says_what_came_out():
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "kernel_tables.py"), "--check"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (0, ""), shown.stderr
