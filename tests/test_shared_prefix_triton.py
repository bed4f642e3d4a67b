"""The Triton twin of shared-prefix attention: run on a GPU or else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.compile_triton import interpret_without_gpu
from tests.shared_prefix_cases import EXTRAS, SHAPES, assert_same, shared_case

interpret_without_gpu()
pytest.importorskip("triton")

from specdec.kernels.shared_prefix import shared_prefix_attention  # noqa: E402
from specdec.kernels.shared_prefix_triton import attend  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_nodes(shape: tuple[int, list[int]], extra: str) -> None:
    assert_same(shared_case(*shape, prefix=65, heads=4, kv_heads=2, device=DEVICE), "triton", extra)


@pytest.mark.parametrize(("prefix", "splits"), [(1, 1), (1, 3), (64, 2), (130, 3), (600, None)])
def test_splits(prefix: int, splits: int | None) -> None:
    """However the prefixes are split, parts that hold nothing among them."""
    given = shared_case(3, [9, 0], prefix, device=DEVICE)
    got = attend(**given, softcap=None, sinks=None, splits=splits)
    torch.testing.assert_close(got, shared_prefix_attention(**given, impl="reference"), rtol=0, atol=1e-5)


def test_halves() -> None:
    assert_same(shared_case(2, [9, 3], 33, heads=6, kv_heads=3, dim=80, dtype=torch.float16, device=DEVICE), "triton")
