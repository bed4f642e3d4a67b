"""Triton kernels compiled for GPUs that need not be there: machine code, registers, spills and shared memory.

Compiling happens in a process of its own, for where tests run kernels in Triton's interpreter it cannot compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OTHERS: dict[str, tuple[str, int | str, int]] = {"sm_89": ("cuda", 89, 32), "sm_120": ("cuda", 120, 32)}
ROOT = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out for one target.

    Attributes:
        machine_code: the cubin or hsaco.
        assembly: the ptx or amdgcn text.
        registers: per thread.
        spills: bytes of memory per thread that registers are spilt to.
        shared: bytes of shared memory per program.
    """

    machine_code: bytes
    assembly: str
    registers: int
    spills: int
    shared: int


def interpret_without_gpu() -> None:
    """Have Triton run kernels on CPU tensors where no GPU is found; called before any kernel is imported."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:  # transformers imports it; its own library was then made to be compiled
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        JITFunction.__call__ = lambda function, *args, **named: InterpretedFunction(function.fn)(*args, **named)


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: str, **options: int
) -> Compiled:
    """Compile a ``triton.jit`` function, which must stand at the top of its module.

    Args:
        signature: type of each argument that is no constant, such as "*fp16", "i32" or "fp32"; "i32:16" for what a
            launch would find to be a multiple of 16. Pointers are taken to be aligned to 16 bytes, as torch's are.
        constants: value of each ``tl.constexpr``, and of each argument that is None.
        target: one of ``TARGETS`` or ``OTHERS``.
        options: ``num_warps``, ``num_stages``.
    """
    work = (kernel.fn.__module__, kernel.fn.__name__, signature, constants, target, options)
    return _compiler().submit(_compile, *work).result(timeout=170)


@cache
def _compiler() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _no_interpreter)


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:] = dict.fromkeys([ROOT, *sys.path])


def _compile(
    module: str, name: str, signature: dict[str, str], constants: dict[str, Any], target: str, options: dict[str, int]
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(module), name)
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    even = [i for i, kind in enumerate(types.values()) if kind[0] == "*" or kind.endswith(":16")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    types = {argument: kind.removesuffix(":16") for argument, kind in types.items()}
    source = ASTSource(kernel, types, constants, aligned)
    result = triton.compile(source, target=GPUTarget(*(TARGETS | OTHERS)[target]), options=options)
    read = _read_cubin if target.startswith("sm") else _read_amdgcn
    return read(result.asm, result.metadata.shared)


def _read_cubin(asm: Any, shared: int) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.findall(rf"\b{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return Compiled(asm["cubin"], asm["ptx"], registers, stack + local, shared)


def _read_amdgcn(asm: Any, shared: int) -> Compiled:
    def number(word: str) -> int:
        return int(re.findall(rf"\.{word}:\s+(\d+)", asm["amdgcn"])[-1])

    stack = number("private_segment_fixed_size")
    return Compiled(asm["hsaco"], asm["amdgcn"], number("vgpr_count"), stack, shared)
