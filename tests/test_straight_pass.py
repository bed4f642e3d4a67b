"""A pass from a model's numbers alone: what the model says, from what it was when the pass was asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

import specdec
from specdec.cache import SlotCache, SlotLayer
from specdec.drafters import NgramDrafter
from specdec.kernels.layer_numba import turns
from specdec.policies import FixedPolicy
from specdec.pool.batch import Batch
from specdec.straight_pass import StraightPass, turns_as_ours
from tests.test_short_stack import alike, build, plain, stack_of
from tests.tiny import model as tiny_model
from tests.tiny import prompt, quick_layers

EVERYWHERE = np.empty((0, 0, 0), np.bool_)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with quick_layers(monkeypatch):
        yield


@torch.no_grad()
def read(model: Any, n: int = 8) -> SlotCache:
    """A cache that holds a text."""
    cache = SlotCache.of(DynamicCache(config=model.config))
    assert cache is not None
    model(input_ids=prompt(n), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def said(straight: StraightPass, cache: SlotCache, position: int = 8) -> torch.Tensor:
    """Logits after one more token, of which the cache keeps nothing."""
    logits = straight.logits(np.array([[5]]), np.array([[position]]), EVERYWHERE, cache)
    assert logits is not None
    cache.keep([8], [()])
    return logits


@torch.no_grad()
def expected(model: Any, position: int = 8) -> torch.Tensor:
    """The same as the model says it."""
    own, places = plain(model), torch.tensor([[position]])
    cache = read(own)
    logits: torch.Tensor = own(torch.tensor([[5]]), position_ids=places, past_key_values=cache, use_cache=True).logits
    return logits


def straight_of(model: Any) -> StraightPass:
    straight = stack_of(model).straight()
    assert straight is not None
    return straight


@pytest.mark.parametrize("position", [0, 8, 3000])
@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
def test_it_says_what_the_model_says(rope: Any, position: int) -> None:
    model = build(**({} if rope is None else {"rope_parameters": rope}))
    straight = straight_of(model)
    assert straight.table is not None
    assert straight.frequencies is not None
    assert straight.weight is not None
    alike(said(straight, read(model), position), expected(model, position))


def test_cos_and_sin_are_the_modules_own() -> None:
    rotary = build(rope_parameters=YARN).model.rotary_emb
    places = torch.arange(0, 30000, 997)
    cos, sin = turns(places.numpy(), rotary.inv_freq.numpy(), np.float32(rotary.attention_scaling))
    own = rotary(torch.empty(0), position_ids=places[None])
    np.testing.assert_allclose(cos, own[0][0], atol=1e-5)
    np.testing.assert_allclose(sin, own[1][0], atol=1e-5)
    assert rotary.attention_scaling != 1


def test_a_rotary_embedding_that_changes_with_the_text_is_called() -> None:
    model = build(rope_parameters=DYNAMIC)
    assert not turns_as_ours(model.model.rotary_emb)
    alike(said(straight_of(model), read(model)), expected(model))


def test_an_embedding_and_a_norm_of_other_kinds_are_called() -> None:
    class Doubled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = build()
    model.model.embed_tokens.__class__, model.model.norm = Doubled, Shifted()
    straight = straight_of(model)
    assert straight.table is None
    assert straight.weight is None
    alike(said(straight, read(model)), expected(model))


def test_an_embedding_of_another_type_is_the_models_to_call() -> None:
    model = build()
    model.model.embed_tokens.bfloat16()
    assert stack_of(model).straight() is None


def test_weights_stay_those_it_was_made_with_and_the_next_one_has_the_new_ones() -> None:
    model = build()
    straight, cache = straight_of(model), read(model)
    before = said(straight, cache)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(-layer.mlp.down_proj.weight.detach())
    after = said(straight_of(model), cache)
    assert not torch.allclose(after, before)
    assert torch.equal(said(straight, cache), before)


def test_who_listens_is_noticed_by_the_next_generation() -> None:
    model, heard = build(), list[int]()
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with specdec.speculating(model, NgramDrafter(), FixedPolicy(4, 4, 1)):
        model.generate(prompt(8), **asked)
        model.model.layers[1].register_forward_hook(lambda *_: heard.append(1))
        model.generate(prompt(8), **asked)
    assert len(heard) > 2  # not of the prompt alone


def test_a_batch_looks_again_when_a_row_joins() -> None:
    model = build()
    with specdec.SessionPool(model) as pool:
        asked = {"max_new_tokens": 6, "do_sample": False}
        pool.submit(prompt(8), **asked).result()
        batch = next(each for each in vars(pool._engine).values() if isinstance(each, Batch))
        assert batch._direct is not None
        for layer in model.model.layers:
            layer.mlp.down_proj.weight = nn.Parameter(-layer.mlp.down_proj.weight.detach())
        got = pool.submit(prompt(8), **asked).result()
    assert got[0].tolist() == plain(model).generate(prompt(8), **asked)[0].tolist()


def test_nothing_is_done_where_gradients_or_another_attention_are_wanted() -> None:
    model = build()
    straight, cache = straight_of(model), read(model)
    given = np.array([[5]]), np.array([[8]]), EVERYWHERE, cache
    assert straight.logits(*given) is None
    with torch.no_grad():
        model.config._attn_implementation_internal = "eager"
        assert straight.logits(*given) is None
    assert cache.lengths == [8]


def test_caches_that_are_not_alike_in_all_layers_are_left_alone() -> None:
    model = tiny_model("Llama", head_dim=16, num_hidden_layers=3)
    good = read(model)
    assert good.open(1, 2) is not None
    assert {tuple(layer.lengths) for layer in good.slots} == {(10,)}
    for spoil in (_another_length, _halves, _a_window):
        cache = read(model)
        spoil(cache)
        held = [list(layer.lengths) for layer in cache.slots]
        assert cache.open(1, 2) is None
        assert [list(layer.lengths) for layer in cache.slots] == held
    assert read(model).open(2, 2) is None


def _another_length(cache: SlotCache) -> None:
    cache.slots[1].crop(-1)


def _halves(cache: SlotCache) -> None:
    cache.slots[1]._values = cache.slots[1]._values.half()


def _a_window(cache: SlotCache) -> None:
    cache.layers[1] = SlotLayer(6)
    cache.layers[1].adopt(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), 8)


def test_a_copy_of_a_cache_is_written_apart() -> None:
    model = build()
    straight, cache = straight_of(model), read(model)
    said(straight, cache)
    other = copy.deepcopy(cache)
    before = [layer._keys.clone() for layer in cache.slots]
    with torch.no_grad():
        straight.logits(np.array([[7]]), np.array([[8]]), EVERYWHERE, other)
    assert all(torch.equal(layer._keys, keys) for layer, keys in zip(cache.slots, before, strict=True))
    assert other.lengths == [9]
    assert cache.lengths == [8]
