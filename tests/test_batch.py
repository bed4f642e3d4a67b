"""Rows that join and leave a SlotCache, against lists of tokens; rows of a Batch, against each generation alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec.cache
from specdec.cache import SlotCache, SlotLayer
from specdec.core import DraftTree, Unsupported
from specdec.model import Form, Model
from specdec.pool.batch import Batch
from tests import tiny
from tests.tiny import VOCAB, prompt

HEADS, WIDTH = 2, 3


@pytest.fixture(autouse=True)
def _small_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are soon too small, windows that soon slide."""
    monkeypatch.setattr(specdec.cache, "GROWTH", 8)


def states(rows: list[list[int]]) -> torch.Tensor:
    """Keys that say which token they are of: [rows, heads, tokens, width]."""
    tokens = torch.tensor(rows, dtype=torch.float32).view(len(rows), 1, -1, 1)
    return tokens.expand(-1, HEADS, -1, WIDTH) + torch.arange(HEADS * WIDTH).view(1, HEADS, 1, WIDTH) / 100


def feed(cache: SlotCache, rows: list[list[int]]) -> None:
    for layer in range(len(cache.layers)):
        cache.update(states(rows), states(rows) + 0.5, layer)


def cache_of(*windows: int | None) -> SlotCache:
    return SlotCache(layers=[SlotLayer(window) for window in windows])


def check(cache: SlotCache, texts: list[list[int]]) -> None:
    """Every layer shows each row's own tokens, as far back as any row may look, and nothing but zeros elsewhere."""
    for layer in cache.slots:
        assert layer.lengths == [len(text) for text in texts]
        first = layer.get_mask_sizes(0)[1]
        assert first == max(layer.offset, min(map(len, texts)) - (layer.window or 10**6) + 1)
        for row, text in enumerate(texts):
            begin = max(0, len(text) - (layer.window or 10**6) + 1)  # before that, nobody looks
            keys = layer.keys[row, :, begin - first : len(text) - first]
            assert torch.equal(keys, states([text[begin:]])[0])
            assert torch.equal(layer.values[row, :, begin - first : len(text) - first], keys + 0.5)
        assert not layer._keys[len(texts) :].any()
        assert not layer._values[len(texts) :].any()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_rows_that_come_and_go(data: st.DataObject) -> None:
    windows = data.draw(st.sampled_from([(None,), (5,), (None, 3), (1,)]))
    cache, texts, tokens = None, [], iter(range(10**6))

    def take(rows: int, n: int) -> list[list[int]]:
        return [[next(tokens) for _ in range(n)] for _ in range(rows)]

    for _ in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["join", "leave", "step", "step", "step"]))
        if not texts or (act == "join" and len(texts) < 6):
            other = cache_of(*windows)
            feed(other, new := take(1, data.draw(st.integers(1, 30))))
            other.keep([0], [range(len(new[0]))])
            if cache is None or not texts:
                cache = other
            else:
                cache.join(other)
            texts += new
        elif act == "leave" and len(texts) > 1:
            row = data.draw(st.integers(0, len(texts) - 1))
            cache.leave(row)
            texts[row] = texts[-1]
            texts.pop()
        else:
            base, new = [len(text) for text in texts], take(len(texts), data.draw(st.integers(1, 9)))
            feed(cache, new)
            keep = st.lists(st.sampled_from(range(len(new[0]))), unique=True).map(sorted)
            paths = [data.draw(keep) for _ in texts]
            cache.keep(base, paths)
            texts = [text + [row[i] for i in path] for text, row, path in zip(texts, new, paths, strict=True)]
        check(cache, texts)


def test_places_are_doubled_so_that_rows_are_seldom_copied() -> None:
    cache, places = cache_of(None), set()
    feed(cache, [[0]])
    for row in range(20):
        other = cache_of(None)
        feed(other, [[row]])
        cache.join(other)
        places.add(cache.layers[0]._keys.data_ptr())
    assert cache.capacity[0] == 32
    assert len(places) <= 5


def test_bytes_are_those_of_the_buffers() -> None:
    cache = cache_of(None, 4)
    feed(cache, [[0, 1, 2]])
    assert cache.bytes_of_token == 2 * 2 * HEADS * WIDTH * 4
    assert cache.bytes == cache.bytes_of_token * cache.capacity[0] * cache.capacity[1]


KINDS: dict[str, tuple[dict[str, Any], Form]] = {
    "Llama": ({}, Form("tree")),
    "Mistral": ({"sliding_window": 6}, Form("tree")),
    "Gemma2": ({"sliding_window": 6}, Form("tree", per_type=True, additive=True)),
    "Mask": ({}, Form("tree", attention="mask")),
    "Bits": ({}, Form("tree", attention="bits")),
}


def started(module: Any, form: Form, ids: torch.Tensor) -> tuple[Model, torch.Tensor]:
    """A Model after its prompt, and the logits of that."""
    found: list[Any] = []

    def hold(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        found.extend((made := Model(model, form), made.start(input_ids, generation_config, kwargs)))
        return input_ids

    module.generate(ids, custom_generate=hold, max_new_tokens=50)
    return found[0], found[1]


def random_tree(random: np.random.Generator, root: int) -> DraftTree:
    n = int(random.integers(1, 8))
    parents = np.array([-1, *(int(random.integers(0, i)) for i in range(1, n))])
    tokens = np.array([root, *random.permutation(np.arange(3, VOCAB))[: n - 1]])
    return DraftTree(tokens, parents, np.ones(n, np.float32), ("",) * n)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batchs_logits_are_those_of_its_rows_alone(kind: str) -> None:
    changes, form = KINDS[kind]
    module = tiny.build(kind if kind in ("Llama", "Mistral", "Gemma2") else "Llama", **changes).double()
    random, batch, alone = np.random.default_rng(3), Batch(module, form), list[Model]()
    for step in range(40):
        if len(alone) < 2 or (len(alone) < 5 and random.random() < 0.25):
            ids = prompt(int(random.integers(1, 25)), seed=step)
            alone.append(started(module, form, ids)[0])
            batch.join(started(module, form, ids)[0])
        elif random.random() < 0.2:
            row = int(random.integers(len(alone)))
            batch.leave(row)
            alone[row] = alone[-1]
            alone.pop()
        trees = [random_tree(random, 5) for _ in alone]
        passed = batch.forward(trees).logits
        paths = []
        for row, (model, tree) in enumerate(zip(alone, trees, strict=True)):
            expected = model.forward([tree]).logits[0]
            torch.testing.assert_close(
                passed[row, : len(tree)], expected, rtol=0, atol=1e-5
            )  # Gemma 2 computes in float32 here and there
            path = [len(tree) - 1]
            while path[0]:
                path.insert(0, int(tree.parents[path[0]]))
            model.keep([path])
            paths.append(path)
        batch.keep(paths)
        assert batch.lengths == [model.lengths[0] for model in alone] == batch.cache.lengths
    while batch.lengths:
        batch.leave(0)
    assert batch.cache.bytes == 0


def test_what_cannot_stand_in_a_batch_leaves_it_as_it_was() -> None:
    module = tiny.build("Llama")
    batch = Batch(module, Form("tree"))
    batch.join(started(module, Form("tree"), prompt(5))[0])
    hidden, _ = started(module, Form("tree"), prompt(5))
    hidden.visible = torch.tensor([[False, True, True, True, True]])
    axes, _ = started(module, Form("tree"), prompt(5))
    axes.shift = torch.zeros(3, 1, 1, dtype=torch.long)
    more, _ = started(module, Form("tree"), prompt(5))
    more.extras = {"token_type_ids": torch.zeros(1, 1)}
    differs, _ = started(module, Form("tree"), prompt(5))
    differs.extras = {"flag": True}
    for model, why in ((hidden, "hidden"), (axes, "axes"), (more, "more inputs"), (differs, "differ")):
        with pytest.raises(Unsupported, match=why):
            batch.join(model)
        assert batch.lengths == batch.cache.lengths == [5]
