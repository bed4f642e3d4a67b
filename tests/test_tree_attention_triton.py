"""The Triton twin: run on a GPU or else in Triton's interpreter, and compiled for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.compile_triton import OTHERS, TARGETS, Compiled, compiled, interpret_without_gpu
from tests.test_tree_attention import EXTRAS, NODES, assert_same, case, extras

interpret_without_gpu()
triton = pytest.importorskip("triton")

from specdec.kernels import tree_attention_triton as kernels  # noqa: E402
from specdec.kernels.tree_attention import tree_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_120": 99, "gfx942": 64}  # of shared memory that a program can have


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel leaves unwritten, or reads too soon, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("nodes", [*NODES[:-1], pytest.param(NODES[-1], marks=pytest.mark.slow)])
def test_nodes(nodes: int) -> None:
    given = case(nodes, [70, 0], heads=2, kv_heads=1, device=DEVICE)
    assert_same(given, "triton", **extras("all", given))


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras(extra: str) -> None:
    given = case(17, [37, 70, 0], heads=3, kv_heads=1, device=DEVICE)
    assert_same(given, "triton", **extras(extra, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 80), (8, 1, 96), (9, 3, 64), (2, 1, 256), (2, 2, 32), (2, 1, 8)]
)
def test_shapes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    given = case(5, [21], heads, kv_heads, dim, dtype, DEVICE)
    assert_same(given, "triton", **extras("all", given))


@pytest.mark.parametrize("splits", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
def test_splits(length: int, splits: int) -> None:
    """However the prefix is split, parts that hold nothing among them."""
    given = case(3, [length, length // 2], device=DEVICE)
    starts = given["lengths"].new_zeros(2, 3)
    got = kernels.tree_attention(**given, starts=starts, softcap=None, sinks=None, splits=splits)
    torch.testing.assert_close(got, tree_attention(**given, impl="reference"), rtol=0, atol=1e-5)


def test_slices_of_larger_buffers() -> None:
    """Keys and values as a cache hands them over: neither contiguous nor starting at its first slot."""
    given = case(4, [30], device=DEVICE)
    for name in ("k", "v"):
        wide = torch.full((3, 5, 60, 40), torch.nan, device=DEVICE)
        wide[1:2, 2:4, 9:46, 4:36] = given[name]
        given[name] = wide[1:2, 2:4, 9:46, 4:36]
    assert_same(given, "triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 9 GB of a GPU's memory")
def test_addresses_beyond_31_bits() -> None:
    given = case(4, [30, 9], dtype=torch.float16, device=DEVICE)
    for name in ("k", "v"):
        far = torch.empty(2**31 + 2**16, dtype=torch.float16, device=DEVICE)
        far = far.as_strided(given[name].shape, (2**31, given[name].stride(1), given[name].stride(2), 1))
        given[name] = far.copy_(given[name])
    assert_same(given, "triton")


def test_the_result_lies_as_the_next_layer_reads_it() -> None:
    given = case(4, [30], device=DEVICE)
    assert tree_attention(**given, impl="triton").transpose(1, 2).is_contiguous()


def test_heads_too_wide_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 256"):
        tree_attention(**case(4, [30], dim=288, device=DEVICE), impl="triton")


SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
INTEGERS = ["heads", "group", "nodes", "share", "part", "count"]
INTEGERS += ["length_row", "start_row", "start_node", "bits_row", "bits_node"]
STRIDES = [f"{of}_{axis}" for of in "qkv" for axis in ("row", "head", "node", "slot")]


def signature(kernel: Any, kind: str) -> dict[str, str]:
    """The types that a launch would give a kernel's arguments."""
    types = dict.fromkeys(("q", "k", "v", "out", "sinks"), f"*{kind}")
    types |= dict.fromkeys(("ancestors", "lengths", "starts"), "*i64") | {"parts": "*fp32", "logs": "*fp32"}
    types |= {"scale": "fp32"} | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(["dim", *STRIDES], "i32:16")
    return {name: types[name] for name in kernel.arg_names if name in types}


def tuned(name: str, kind: str, dim: int, target: str, softcap: float = 0.0, rows: int = 64) -> Compiled:
    """A kernel with the tile that the tuning file has for a target, or one of fewer ``rows``."""
    size, kernel = kernels.tiles(target, SIZES[kind], dim), getattr(kernels, name)
    constants = {"SOFTCAP": softcap, "TILE": min(rows, size.rows), "SLOTS": size.slots, "DIM": dim}
    options = {"num_warps": size.warps, "num_stages": size.stages}
    return compiled(kernel, signature(kernel, kind), constants, target, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kind", "dim", "softcap"),
    [
        ("bf16", 64, 0.0),
        ("fp16", 128, 50.0),
        ("bf16", 256, 0.0),
        ("fp32", 64, 0.0),
        ("fp32", 64, 50.0),
        ("fp32", 128, 0.0),
        ("fp32", 256, 0.0),
    ],
)
@pytest.mark.parametrize("name", ["prefix_kernel", "tree_kernel"])
def test_machine_code(name: str, kind: str, dim: int, softcap: float, target: str, record_property: Any) -> None:
    """The tiles of the tuning file compile, within registers and shared memory."""
    assert_sound(tuned(name, kind, dim, target, softcap), target, record_property)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "dim"), [("bf16", 128), ("fp32", 64)])
@pytest.mark.parametrize("name", ["prefix_kernel", "tree_kernel"])
def test_machine_code_for_few_queries(name: str, kind: str, dim: int, target: str, record_property: Any) -> None:
    """Tiles of fewer rows than the tuning file's, which nodes and heads do not fill."""
    for rows in (16, 32):
        assert_sound(tuned(name, kind, dim, target, rows=rows), target, record_property)


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize(("kind", "dim"), [("bf16", 64), ("bf16", 128), ("fp32", 128), ("bf16", 256)])
@pytest.mark.parametrize("name", ["prefix_kernel", "tree_kernel"])
def test_machine_code_of_usual_tiles(name: str, kind: str, dim: int, target: str, record_property: Any) -> None:
    """GPUs that the tuning file does not name have tiles, too."""
    assert_sound(tuned(name, kind, dim, target), target, record_property)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_the_merge(target: str, record_property: Any) -> None:
    constants = {"PARTS": 512, "FEW": 8, "DIM": 256}
    record = compiled(kernels.merge_kernel, signature(kernels.merge_kernel, "bf16"), constants, target, num_warps=1)
    assert_sound(record, target, record_property)


def assert_sound(record: Compiled, target: str, record_property: Any) -> None:
    record_property("registers", record.registers)
    record_property("shared", record.shared)
    assert record.machine_code
    assert record.assembly
    assert record.spills == 0
    assert record.shared <= 1024 * KIB[target]


def test_every_tile_fits() -> None:
    """For every architecture, number and head dimension there are tiles, and slots divide a word of bits."""
    for architecture in (*TARGETS, "sm_89", "gfx90a"):
        for size in (2, 4):
            for dim in (8, 64, 80, 96, 128, 256):
                assert 64 % kernels.tiles(architecture, size, dim).slots == 0
