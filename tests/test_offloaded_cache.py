"""KV rows in the host's memory: the same tokens, and each layer's rows on their way before the layer is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec import offloaded_cache
from specdec.attach import attach
from specdec.core import DraftTree
from specdec.drafters import NgramDrafter, TriForceDrafter
from specdec.model import Model
from specdec.offloaded_cache import OffloadedCache, OffloadedLayer
from specdec.policies import FixedPolicy
from specdec.pool import SessionPool
from tests import tiny
from tests.tiny import Oracle, padded, prompt, quietly

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="a CUDA build of torch makes no streams without a GPU",
)
OFFLOADED = {"cache_implementation": "offloaded"}  # which plain ``generate`` can do on a GPU only


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {}), ("Llama", {"num_key_value_heads": 4}), ("Gemma2", {"sliding_window": 6}), ("Qwen2", {})],
    ids=str,
)
def test_the_tokens_are_those_of_plain_generate(kind: str, more: dict[str, int]) -> None:
    model, inputs = tiny.build(kind, **more).double(), padded(9, 14, 5)
    expected = model.generate(**inputs, max_new_tokens=30)
    specdec.wrap(model, drafter=Oracle([row.tolist() for row in expected]), policy=FixedPolicy(12, 5, 6))
    assert model.generate(**inputs, max_new_tokens=30, **OFFLOADED).tolist() == expected.tolist()
    assert specdec.stats(model).accepted > 0
    assert specdec.stats(model).plain_generations == 0


def started(model: Any) -> Model:
    """A model that has read a prompt."""
    target = Model(model, attach(model).form)
    cache = DynamicCache(config=model.config, offloading=True)
    kwargs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    config = model.generation_config
    config._mask_length = 20
    with torch.no_grad():
        target.start(prompt(20), config, kwargs)
    return target


def test_rows_are_fetched_while_the_layer_before_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    target, order = started(tiny.build("Llama", num_hidden_layers=3)), []
    layers = target.cache.layers
    for name in ("fetch", "read"):
        do = getattr(OffloadedLayer, name)

        def noted(layer: Any, *args: Any, name: str = name, do: Any = do) -> Any:
            result = do(layer, *args)
            order.append((name, layers.index(layer)))
            return result

        monkeypatch.setattr(OffloadedLayer, name, noted)
    target.forward([DraftTree.root(5)])
    assert order == [("read", 0), ("fetch", 1), ("read", 1), ("fetch", 2), ("read", 2)]
    assert all(layer._ahead is None for layer in layers), "nothing stays on the device"


def test_what_a_pass_adds_is_brought_home_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last layer; of a long pass layer by layer, since a prompt's rows may not fit the device."""
    pieces, bring = list[int](), OffloadedCache._brought_home

    def noted(self: OffloadedCache, states: Any) -> Any:
        assert self.lengths == [20]
        pieces.append(len(states))
        return bring(self, states)

    target = started(tiny.build("Llama", num_hidden_layers=3))
    monkeypatch.setattr(OffloadedCache, "_brought_home", noted)
    for together in (2, 1):
        monkeypatch.setattr(offloaded_cache, "TOGETHER", together)
        target.forward([DraftTree.chain(5, [6], [0.9], "")])
        assert pieces == [6]
        assert target.cache.lengths == [22]
        target.keep([[]])


def test_what_is_held_is_one_piece_of_the_hosts_memory() -> None:
    target = started(tiny.build("Llama"))
    assert isinstance(target.cache, OffloadedCache)
    for layer in target.cache.slots:
        for slots in layer.buffers:
            assert slots[:, :, :20].permute(2, 0, 1, 3).is_contiguous()
            assert slots.device.type == "cpu"


def test_what_was_fetched_before_rows_changed_is_not_read() -> None:
    model = tiny.build("Llama").double()
    ours, plain = started(model), started(model)
    tree = DraftTree(
        torch.tensor([5, 6, 7]).numpy(), torch.tensor([-1, 0, 0]).numpy(), torch.ones(3).numpy(), ("",) * 3
    )
    for target in (ours, plain):
        target.forward([tree])
        for layer in target.cache.slots if target is ours else ():
            layer.fetch(2)
        target.keep([[0, 2]])
        for layer in target.cache.slots if target is ours else ():
            assert layer._ahead is None
    mine, theirs = (each.forward([DraftTree.chain(8, [9, 10], [0.9, 0.8], "")]).logits for each in (ours, plain))
    torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one to one"])
def test_a_draft_taken_back_leaves_the_same_bytes(heads: int) -> None:
    target = started(tiny.build("Llama", num_key_value_heads=heads))
    target.forward([DraftTree.chain(5, [6, 7], [0.9, 0.8], "")])
    target.keep([[0, 1]])
    before = [(layer.keys.clone(), layer.values.clone(), layer.lengths) for layer in target.cache.slots]
    target.forward([DraftTree.chain(8, [9, 10], [0.9, 0.8], "")])
    target.keep([[]])
    for layer, (keys, values, lengths) in zip(target.cache.slots, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.lengths == lengths == [22]


def test_the_cache_that_is_returned_is_a_users() -> None:
    model = tiny.build("Llama").double()
    expected = model.generate(prompt(), max_new_tokens=12, return_dict_in_generate=True, eos_token_id=None)
    specdec.wrap(model, drafter=Oracle([expected.sequences[0].tolist()]), policy=FixedPolicy(12, 5, 6))
    ours = model.generate(
        prompt(), max_new_tokens=12, return_dict_in_generate=True, eos_token_id=None, **OFFLOADED
    ).past_key_values
    assert ours.offloading
    assert type(ours.layers[0]).__name__ == "DynamicLayer"
    for mine, theirs in zip(ours.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        assert mine.device == torch.device("cpu")


def test_triforce_reads_few_rows_of_many() -> None:
    model = tiny.build("Llama", max_position_embeddings=512).double()
    text = prompt(150)
    expected = model.generate(text, max_new_tokens=40, eos_token_id=None)
    drafter = TriForceDrafter(first=NgramDrafter(), budget=64, chunk=8)
    specdec.wrap(model, drafter=drafter, policy=FixedPolicy(6, 6, 1))
    assert model.generate(text, max_new_tokens=40, eos_token_id=None, **OFFLOADED).tolist() == expected.tolist()
    assert specdec.stats(model).by_drafter["triforce"]["drafted"] > 0


def test_in_a_pool_such_a_request_runs_alone() -> None:
    model = tiny.build("Llama").double()
    with SessionPool(model) as pool, quietly():
        ours = pool.generate(prompt(), max_new_tokens=12, **OFFLOADED)
        assert ours.tolist() == model.generate(prompt(), max_new_tokens=12).tolist()
        assert any("host's memory" in reason for reason in pool.stats.reasons)
