"""Random trees behind prefixes of their own and one that all rows share, and what each twin is to say of them."""

from __future__ import annotations

from typing import Any

import torch

from specdec.kernels.shared_prefix import shared_prefix_attention
from tests.test_tree_attention import TOLERANCE, case, extras

EXTRAS = ("plain", "softcap", "sinks")
SHAPES = ((1, [0]), (1, [3, 3, 3]), (5, [0, 7, 70]), (17, [2, 0]))  # nodes, and the rows' own lengths


def shared_case(nodes: int, lengths: list[int], prefix: int, **more: Any) -> dict[str, Any]:
    """Slots behind a row's nodes are no numbers."""
    given, draw = case(nodes, lengths, **more), torch.Generator().manual_seed(prefix)
    for name in ("k", "v"):
        _, heads, _, dim = given[name].shape
        given[f"shared_{name}"] = torch.randn(1, heads, prefix, dim, generator=draw).to(given[name])
    return given


def assert_same(given: dict[str, Any], impl: Any, extra: str = "plain") -> None:
    """A twin says what attention over each row's whole slots says, in float32."""
    more = extras(extra, given)
    full = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    wanted = shared_prefix_attention(**full, impl="reference", **more)
    got = shared_prefix_attention(**given, impl=impl, **more)
    assert got.dtype == given["q"].dtype
    assert wanted.isfinite().all()
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=TOLERANCE[got.dtype])
