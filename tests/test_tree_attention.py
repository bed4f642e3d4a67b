"""Tree attention: the definition cell by cell, and the torch twin against it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from specdec import trees
from specdec.kernels.tree_attention import pack_bits, tree_attention, unpack_bits

NODES = (1, 2, 63, 64, 65, 512)


def random_parents(nodes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([-1, *[rng.integers(max(0, i - 6), i) for i in range(1, nodes)]])


def case(
    nodes: int,
    lengths: list[int],
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare: int = 3,
) -> dict[str, Any]:
    """Random trees behind prefixes; every slot behind a row's nodes is no number."""
    generator = torch.Generator().manual_seed(nodes)
    q, k, v = (
        torch.randn(len(lengths), n, h, dim, generator=generator, dtype=torch.float32).transpose(1, 2)
        for n, h in ((nodes, heads), (max(lengths) + nodes + spare, kv_heads), (max(lengths) + nodes + spare, kv_heads))
    )
    for row, length in enumerate(lengths):
        k[row, :, length + nodes :] = v[row, :, length + nodes :] = torch.nan
    words = [trees.ancestor_words(random_parents(nodes, row)).view(np.int64) for row in range(len(lengths))]
    tensors = {
        "q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype),
        "ancestors": torch.from_numpy(np.stack(words)), "lengths": torch.tensor(lengths),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"scale": dim**-0.5}


def extras(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What else a model may ask of its attention."""
    q, lengths = given["q"], given["lengths"]
    starts = (lengths[:, None] // 3).expand(-1, q.shape[2])
    return {
        "plain": {},
        "window": {"window": 4},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.linspace(-1, 2, q.shape[1]).to(q)},
        "starts": {"starts": starts},
        "all": {"window": 9, "softcap": 2.0, "sinks": torch.linspace(-1, 2, q.shape[1]).to(q), "starts": starts},
    }[name]


EXTRAS = ("plain", "window", "softcap", "sinks", "starts", "all")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_same(given: dict[str, Any], impl: Any, **more: Any) -> None:
    """A twin says what the reference says about the same numbers in float32."""
    full = {name: x.float() if name in ("q", "k", "v") else x for name, x in given.items()}
    wanted = tree_attention(**full, impl="reference", **more)
    got = tree_attention(**given, impl=impl, **more)
    assert got.dtype == given["q"].dtype
    assert got.shape == given["q"].shape
    assert wanted.isfinite().all()
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=TOLERANCE[got.dtype])


def spelt_out(given: dict[str, Any], row: int, head: int, node: int, parents: np.ndarray, **more: Any) -> torch.Tensor:
    """One node's attention by walking up its path."""
    path = [node]
    while path[-1] > 0:
        path.append(int(parents[path[-1]]))
    length = int(given["lengths"][row])
    start = int(more["starts"][row, node]) if "starts" in more else 0
    slots = [*range(start, length), *[length + i for i in reversed(path)]]
    if (window := more.get("window")) is not None:
        slots = slots[-window:]
    shared = head // (given["q"].shape[1] // given["k"].shape[1])
    scores = [float(given["q"][row, head, node] @ given["k"][row, shared, slot]) * given["scale"] for slot in slots]
    if (softcap := more.get("softcap")) is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (math.exp(more["sinks"][head]) if "sinks" in more else 0)
    return sum(w / total * given["v"][row, shared, slot] for w, slot in zip(weights, slots, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_definition(extra: str) -> None:
    given = case(9, [7, 3], dim=16)
    more = extras(extra, given)
    out = tree_attention(**given, impl="reference", **more)
    for row in range(2):
        parents = random_parents(9, row)
        for head, node in ((0, 0), (2, 5), (3, 8), (5, 7)):
            wanted = spelt_out(given, row, head, node, parents, **more)
            torch.testing.assert_close(out[row, head, node], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("lengths", [[0], [1], [33, 33], [0, 70, 5]], ids=str)
@pytest.mark.parametrize("nodes", NODES)
def test_torch(nodes: int, lengths: list[int], extra: str) -> None:
    given = case(nodes, lengths)
    assert_same(given, "torch", **extras(extra, given))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 80), (8, 1, 96), (9, 3, 64), (2, 1, 256)])
def test_torch_in_other_shapes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    given = case(5, [21], heads, kv_heads, dim, dtype)
    for extra in EXTRAS:
        assert_same(given, "torch", **extras(extra, given))


def test_the_torch_twin_copies_no_shared_keys() -> None:
    """Nothing as large as the keys of all query heads is ever made."""
    given = case(2, [4000], heads=8, kv_heads=1, dim=64, spare=0)
    repeated = 8 * given["k"].nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tree_attention(**given, impl="torch")
    assert max(event.cpu_memory_usage for event in profile.events()) < repeated / 2


@pytest.mark.parametrize("nodes", NODES)
def test_bits(nodes: int) -> None:
    parents = random_parents(nodes, 1)
    words = torch.from_numpy(trees.ancestor_words(parents).view(np.int64))
    seen = torch.from_numpy(trees.ancestor_matrix(parents))
    assert torch.equal(pack_bits(seen), words)
    assert torch.equal(unpack_bits(words, nodes), seen)


def test_what_does_not_fit_is_refused() -> None:
    given = case(3, [4])
    with pytest.raises(ValueError, match="do not fit together"):
        tree_attention(**{**given, "k": given["k"][:, :, :, :16]})
    with pytest.raises(ValueError, match=r"int64 \[1, 3, 1\]"):
        tree_attention(**{**given, "ancestors": given["ancestors"].int()})
    with pytest.raises(ValueError, match=r"lengths must be \[1\]"):
        tree_attention(**{**given, "lengths": torch.tensor([4, 4])})
    with pytest.raises(ValueError, match="impl is 'flash'"):
        tree_attention(**given, impl="flash")  # type: ignore[arg-type]


def test_without_a_gpu_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="runs on GPUs"):
        tree_attention(**case(3, [4]), impl="triton")
