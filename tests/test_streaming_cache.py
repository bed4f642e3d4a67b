"""Sinks and a window: what is held, that a rejected draft leaves no trace, and that attention means the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from specdec import trees
from specdec.cache import GROWTH
from specdec.core import DraftTree
from specdec.model import Model
from specdec.streaming_cache import StatesAndStreamingRows, StreamingCache, StreamingLayer
from tests import tiny
from tests.long_context import started
from tests.tiny import prompt

HEADS = {"grouped": 2, "one to one": 4}
WINDOWS, STATES = tiny.hybrids(16), {kind: tiny.RECURRENT[kind] for kind in ("Lfm2", "FalconH1", "Zaya")}


def rows(first: int, count: int, batch: int = 1) -> torch.Tensor:
    """Keys that say which token they are of."""
    return torch.arange(first, first + count).float()[None, None, :, None].expand(batch, 2, count, 3).clone()


def fed(layer: StreamingLayer, first: int, count: int) -> list[int]:
    """Write tokens; returns what attention sees."""
    keys, values = layer.update(rows(first, count), -rows(first, count))
    assert (keys == -values).all()
    return keys[0, 0, :, 0].int().tolist()


def held(layer: StreamingLayer) -> list[int]:
    return layer.keys[0, 0, :, 0].int().tolist()


def test_g21() -> None:
    """What two more tokens leave of six."""
    layer = StreamingLayer(sinks=2, recent=4, slack=0)
    fed(layer, 0, 6)
    fed(layer, 6, 2)
    layer.keep([6], [[0, 1]], None)
    assert held(layer) == [0, 1, 4, 5, 6, 7]
    assert layer.get_mask_sizes(1) == (7, 2)
    assert layer.get_seq_length() == 8


@pytest.mark.parametrize("slack", [0, 3, 10])
def test_sinks_stay_and_no_more_than_the_slack_is_held(slack: int) -> None:
    layer, draw, length = StreamingLayer(3, 8, slack), np.random.default_rng(0), 0
    for _ in range(80):
        nodes = int(draw.integers(1, 6))
        path = sorted(draw.choice(nodes, int(draw.integers(0, nodes + 1)), replace=False).tolist())
        fed(layer, length, nodes)
        moves = torch.tensor([path]) if path != list(range(len(path))) else None
        layer.keep([length], [path], moves)
        layer._keys[:, :, : length + len(path) - layer.offset][:, :, length - layer.offset :] = rows(length, len(path))
        layer._values[:] = -layer._keys
        length += len(path)
        seen = held(layer)
        assert len(seen) <= 3 + 8 + slack
        assert seen[:3] == list(range(min(3, length)))
        assert seen[-8:] == list(range(max(0, length - 8), length))
        assert seen[3:] == list(range(length - len(seen[3:]), length))


def test_a_draft_taken_back_leaves_the_same_bytes() -> None:
    layer = StreamingLayer(2, 6, 4)
    for token in range(31):
        fed(layer, token, 1)
        layer.keep([token], [[0]], None)
        before = layer.keys.clone(), layer.values.clone(), layer.offset, list(layer.lengths)
        fed(layer, 900, 4)
        layer.keep([token + 1], [[]], None)
        assert torch.equal(layer.keys, before[0])
        assert torch.equal(layer.values, before[1])
        assert (layer.offset, layer.lengths) == before[2:]


def test_tokens_that_are_gone_cannot_be_gone_back_to() -> None:
    layer = StreamingLayer(2, 4, 0)
    fed(layer, 0, 20)
    layer.keep([0], [range(20)], None)
    layer.keep([17], [[]], None)
    with pytest.raises(ValueError, match="token 15: those before 16 are gone"):
        layer.keep([15], [[]], None)


def test_memory_is_the_same_for_any_length() -> None:
    layer, sizes = StreamingLayer(4, 100, 16), set()
    fed(layer, 0, 5000)
    for token in range(5000, 7000):
        fed(layer, token, 1)  # as plain generate does, without keep
        sizes.add(layer._keys.shape[2])
    assert max(sizes) <= 4 + 100 + 16 + 2 * GROWTH
    assert held(layer)[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("arguments", [{"sinks": -1}, {"recent": 0}, {"slack": -2}])
def test_sizes_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give at least 0, 1 and 0"):
        StreamingCache(**arguments)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_is_full_attention_with_the_dropped_tokens_masked(heads: int, attention: str) -> None:
    model, text = tiny.model(num_key_value_heads=heads, attn_implementation=attention), prompt(60)
    cache = StreamingCache(sinks=2, recent=10, slack=5)
    seen, logits, layer = list[list[int]](), list[torch.Tensor](), None
    for token in range(60):
        with torch.no_grad():
            logits.append(model(text[:, token : token + 1], past_key_values=cache).logits[0, 0])
        layer = cache.slots[0]
        dropped = layer.offset
        seen.append([*range(min(2, token + 1)), *range(2 + dropped, token + 1)])
    mask = torch.zeros(1, 1, 60, 60, dtype=torch.bool)
    for token, others in enumerate(seen):
        mask[0, 0, token, others] = True
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = model(text, attention_mask=additive if attention == "eager" else mask).logits[0]
    assert dropped > 30
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WINDOWS)
def test_layers_with_windows_or_chunks_of_their_own_hold_those(kind: str) -> None:
    """Beside them, a layer without a window holds sinks and the newest."""
    model, text = tiny.build(kind, **WINDOWS[kind]), prompt(60)
    cache = StreamingCache(sinks=2, recent=10, slack=5, config=model.config)
    full, logits = cache.slots[WINDOWS[kind]["layer_types"].index("full_attention")], list[torch.Tensor]()
    masks = {name: torch.zeros(1, 1, 60, 60, dtype=torch.bool) for name in WINDOWS[kind]["layer_types"]}
    for token in range(60):
        with torch.no_grad():
            logits.append(model(text[:, token : token + 1], past_key_values=cache).logits[0, 0])
        masks["full_attention"][..., token, [*range(min(2, token + 1)), *range(2 + full.offset, token + 1)]] = True
        if kind == "Llama4Text":
            masks["chunked_attention"][..., token, token // 16 * 16 : token + 1] = True
        else:
            masks["sliding_attention"][..., token, max(0, token - 15) : token + 1] = True
    with torch.no_grad():
        wanted = model(text, attention_mask=masks).logits[0]
    assert full.offset > 30
    assert max(layer._keys.shape[2] for layer in cache.slots) < 16 + 5 + 2 * GROWTH
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WINDOWS | STATES)
def test_plain_generate_of_a_hybrid_model_is_exact_within_the_window(kind: str) -> None:
    model = tiny.build(kind, **(WINDOWS | STATES)[kind])
    arguments = {"max_new_tokens": 60, "eos_token_id": None}
    plain, cache = model.generate(prompt(), **arguments), StreamingCache(config=model.config)
    assert model.generate(prompt(), **arguments, past_key_values=cache).tolist() == plain.tolist()
    cache = StreamingCache(sinks=2, recent=8, slack=0, config=model.config)
    model.generate(prompt(), **arguments, past_key_values=cache)
    held = cache.slots or [layer.rows for layer in cache.layers if isinstance(layer, StatesAndStreamingRows)]
    assert max(layer.keys.shape[2] for layer in held) <= 17


@pytest.mark.parametrize("kind", ["FalconH1", "Zaya"])
def test_rows_beside_states_in_one_layer_are_hidden_alone(kind: str) -> None:
    """The newest token sees the sinks, those in the window, and the states of all: as if others were masked."""
    model, text = tiny.build(kind, **STATES[kind]), prompt(40)
    cache = StreamingCache(sinks=2, recent=8, slack=0, config=model.config)
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :39], past_key_values=full)
        model(text[:, :39], past_key_values=cache)
        for layer, held in zip(full.layers, cache.layers, strict=True):
            held.rows._slide()
            layer.keys, layer.values = (
                torch.cat([rows[:, :, :2], rows[:, :, 31:39]], 2) for rows in (layer.keys, layer.values)
            )
        ours = model(text[:, 39:], past_key_values=cache, position_ids=torch.tensor([[39]])).logits
        theirs = model(text[:, 39:], past_key_values=full, position_ids=torch.tensor([[39]])).logits
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(ours, theirs)


def test_plain_generate_runs_on_it_and_is_exact_within_the_window() -> None:
    model, arguments = tiny.model(), {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt(), **arguments)
    assert model.generate(prompt(), **arguments, past_key_values=StreamingCache()).tolist() == plain.tolist()
    cache = StreamingCache(sinks=2, recent=8, slack=0)
    model.generate(prompt(), **arguments, past_key_values=cache)
    assert cache.slots[0].keys.shape[2] <= 12


TAKE_TREES = {name: partial(tiny.model, num_key_value_heads=heads) for name, heads in HEADS.items()} | {
    kind: partial(tiny.build, kind, **WINDOWS[kind]) for kind in WINDOWS
}


@pytest.mark.parametrize("make", TAKE_TREES.values(), ids=TAKE_TREES)
def test_a_model_drafts_trees_on_it(make: Callable[[], Any]) -> None:
    """A tree's nodes say behind a window what each of its paths says alone, and only the accepted path stays."""
    model = make()
    target, alone = streaming(model, prompt(40)), streaming(model, prompt(40))
    parents, tokens = np.array([-1, 0, 0, 1, 2, 1]), np.array([3, 5, 6, 7, 7, 9])
    tree = DraftTree(tokens, parents, np.ones(6, np.float32), ("",) * 6)
    before = [(layer.keys.clone(), layer.values.clone(), layer.offset) for layer in target.cache.slots]
    logits = target.forward([tree]).logits[0]
    target.keep([[]])
    for layer, (keys, values, offset) in zip(target.cache.slots, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.offset == offset
    assert torch.equal(target.forward([tree]).logits[0], logits)
    target.keep([[0, 2, 4]])
    for leaf in (3, 5, 4):
        path = np.flatnonzero(trees.ancestor_matrix(parents)[leaf])
        chain = DraftTree.chain(3, tokens[path[1:]].tolist(), [1.0] * 2, "")
        torch.testing.assert_close(alone.forward([chain]).logits[0, -1], logits[leaf], atol=1e-4, rtol=1e-4)
        alone.keep([range(3) if leaf == 4 else []])
    for ours, theirs in zip(target.cache.slots, alone.cache.slots, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        assert ours.offset == theirs.offset > 0


def streaming(model: Any, ids: torch.Tensor) -> Model:
    """A model that has read a prompt into a streaming cache."""
    target = started(model, ids)
    target.cache = StreamingCache(sinks=2, recent=8, slack=6, config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=target.cache)
    target.cache.keep([0], [range(ids.shape[1])])
    return target
