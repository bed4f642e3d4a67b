"""All layers in one call: what single layers say, and single layers wherever somebody has a say in between."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

import specdec
from specdec import cpu
from specdec.cache import Open, SlotCache, SlotLayer
from specdec.drafters import NgramDrafter
from specdec.policies import FixedPolicy
from specdec.short_layer import ShortLayer
from specdec.short_stack import ShortStack
from specdec.straight_pass import StraightPass
from tests.tiny import model as tiny_model
from tests.tiny import prompt, quick_layers


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with quick_layers(monkeypatch):
        yield


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of each pass that went through all layers in one call."""
    nodes: list[int] = []
    own = ShortStack.through

    def counted(self: ShortStack, tables: Any, x: Any, *args: Any) -> Any:
        (slots,) = (arg for arg in args if isinstance(arg, Open))
        nodes.append(len(x) // len(slots.starts))
        return own(self, tables, x, *args)

    monkeypatch.setattr(ShortStack, "through", counted)
    return nodes


def build(layers: int = 3, **changes: Any) -> Any:
    """A random model with our layers."""
    model = tiny_model("Llama", head_dim=16, num_hidden_layers=layers, **changes)
    assert cpu.install(model) == ""
    return model


def plain(model: Any) -> Any:
    """A copy with its own layers."""
    other = copy.deepcopy(model)
    cpu.remove(other)
    return other


@torch.no_grad()
def said(model: Any, straight: bool = False, **arguments: Any) -> Any:
    """What it says of three tokens behind two texts of unlike length, and the rows that it then holds.

    If ``straight``, its logits as its stack says them.
    """
    cache = SlotCache.of(DynamicCache(config=model.config))
    model(input_ids=prompt(8, 2), past_key_values=cache, use_cache=True)
    cache.keep([0, 0], [list(range(8)), list(range(5))])
    mask = torch.zeros(2, 1, 3, 11, dtype=torch.bool)
    for row, held in enumerate((8, 5)):
        mask[row, 0, :, :held] = True
        mask[row, 0, :, held : held + 3] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    positions = torch.tensor([[8, 9, 9], [5, 6, 6]])
    if straight:
        return stack_of(model).logits(prompt(3, 2, 1), mask, positions, cache), cache
    inputs = {"input_ids": prompt(3, 2, 1), "attention_mask": mask, "position_ids": positions}
    output = model(**inputs, past_key_values=cache, use_cache=True, **arguments)
    return output, cache


def stack_of(model: Any) -> ShortStack:
    stack: ShortStack = vars(model.model)["forward"]
    return stack


def alike(ours: torch.Tensor, own: torch.Tensor) -> None:
    """Equal up to rounding."""
    assert ours.shape == own.shape
    assert (ours - own).abs().max() <= cpu.TOLERANCE * (own - own.mean(-1, keepdim=True)).abs().max()


def test_logits_and_rows(stacked: list[int]) -> None:
    model = build()
    assert isinstance(vars(model.model)["forward"], ShortStack)
    stacked.clear()
    ours, rows = said(model)
    assert stacked == [3]
    own, expected = said(plain(model))
    assert stacked == [3]
    alike(ours.logits, own.logits)
    assert rows.lengths == expected.lengths == [11, 8]
    for layer, theirs in zip(rows.layers, expected.layers, strict=True):
        alike(layer.keys[0], theirs.keys[0])
        alike(layer.values[1, :, :8], theirs.values[1, :, :8])


def test_rows_grow_where_there_is_no_room() -> None:
    model, caches = build(), []
    for each in (model, plain(model)):
        cache = SlotCache.of(DynamicCache(config=model.config))
        with torch.no_grad():
            for n in (4, 200, 200):
                logits = each(input_ids=prompt(n, 1, n), past_key_values=cache, use_cache=True).logits
        caches.append((logits, cache.layers[2].keys))
    alike(caches[0][0], caches[1][0])
    alike(caches[0][1], caches[1][1])


def _a_hook(model: Any, seen: list[torch.Tensor]) -> None:
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))


def _a_forward(model: Any, seen: list[torch.Tensor]) -> None:
    layer = model.model.layers[1]
    forward = layer.forward

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(forward(*args, **kwargs))
        return 2 * seen[-1]

    layer.forward = noted


def _fewer(model: Any, seen: list[torch.Tensor]) -> None:
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2


def _one_gone(model: Any, seen: list[torch.Tensor]) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    model.model.layers[1].self_attn.layer_idx = 1


def _another_order(model: Any, seen: list[torch.Tensor]) -> None:
    first, second, _ = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first
    second.self_attn.layer_idx, first.self_attn.layer_idx = 0, 1


def _a_part_of_its_own(model: Any, seen: list[torch.Tensor]) -> None:
    model.model.layers[1].mlp.forward = lambda x: torch.zeros_like(x)


@pytest.mark.parametrize("change", [_a_hook, _a_forward, _fewer, _one_gone, _another_order, _a_part_of_its_own])
def test_changed_layers_run_one_by_one(change: Callable[[Any, list[torch.Tensor]], None], stacked: list[int]) -> None:
    model, seen, expected = build(), list[torch.Tensor](), list[torch.Tensor]()
    own = plain(model)
    change(model, seen)
    change(own, expected)
    stacked.clear()
    alike(said(model)[0].logits, said(own)[0].logits)
    assert not stacked
    for ours, theirs in zip(seen, expected, strict=True):
        alike(ours, theirs)


def test_hidden_states_are_those_between_layers(stacked: list[int]) -> None:
    model = build()
    own = plain(model)
    for asked in (True, False):
        stacked.clear()
        ours, theirs = (said(each, output_hidden_states=asked)[0] for each in (model, own))
        assert stacked == ([] if asked else [3])  # transformers' hooks stay; nobody listens to them
        alike(ours.logits, theirs.logits)
        for one, other in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            alike(one, other)
    assert len(said(model, output_hidden_states=True)[0].hidden_states) == 4


def test_new_weights_are_seen(stacked: list[int]) -> None:
    model = build()
    said(model)
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach().clone())
    stacked.clear()
    alike(said(model)[0].logits, said(plain(model))[0].logits)
    assert stacked == [3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(copied: Callable[[Any], Any], stacked: list[int]) -> None:
    model = build()
    before = said(model)[0].logits
    other = copied(model)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    stacked.clear()
    alike(said(other)[0].logits, before)
    assert stacked == [3]


def test_other_caches_take_single_layers(stacked: list[int]) -> None:
    model = build()
    stacked.clear()
    with torch.no_grad():
        for each in (model, plain(model)):
            cache = DynamicCache(config=model.config)
            each(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            logits = each(input_ids=prompt(1), past_key_values=cache, use_cache=True).logits
            each.said = logits
            each.seen = cache.get_seq_length()
            assert each.seen == 9
    assert not stacked


def test_windows_take_single_layers(stacked: list[int]) -> None:
    model = build()
    ours, theirs = (SlotCache(layers=[SlotLayer(6) for _ in range(3)]) for _ in range(2))
    stacked.clear()
    with torch.no_grad():
        for each, cache in ((model, ours), (plain(model), theirs)):
            each(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            each(input_ids=prompt(1), past_key_values=cache, use_cache=True)
    assert not stacked
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        alike(one.keys, other.keys)


def test_a_layer_called_by_itself_runs_alone(stacked: list[int]) -> None:
    model = build()
    x, turn, outputs = torch.randn(2, 1, 32), torch.ones(2, 1, 16), []
    for each in (model, plain(model)):
        _, cache = said(each)
        stacked.clear()
        given = {"attention_mask": torch.ones(2, 1, 1, 12, dtype=torch.bool), "position_embeddings": (turn, turn)}
        with torch.no_grad():
            outputs.append(each.model.layers[0](x, past_key_values=cache, **given))
        assert not stacked
    alike(*outputs)


def test_layers_left_out_of_a_text_that_has_begun(stacked: list[int]) -> None:
    model = build()
    own = plain(model)
    results = []
    for each in (model, own):
        cache = SlotCache.of(DynamicCache(config=model.config))
        with torch.no_grad():
            each(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            each.model.layers = each.model.layers[1:]
            stacked.clear()
            results.append(each(input_ids=prompt(1), past_key_values=cache, use_cache=True).logits)
    assert not stacked
    alike(*results)


def test_a_model_that_gives_its_layers_something_else_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.nn.Module.__call__

    def changed(self: Any, hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
        return own(self, hidden + self.self_attn.layer_idx, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", changed)
    model = build()
    assert isinstance(vars(model.model.layers[0])["forward"], ShortLayer)
    assert "forward" not in vars(model.model)


def test_layers_of_two_kinds_are_not_joined() -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 10}
    model = tiny_model("Qwen3", head_dim=16, **kinds)
    assert cpu.install(model) == ""
    assert "forward" in vars(model.model.layers[0])
    assert "forward" not in vars(model.model)


class Leaving(torch.nn.ModuleList):
    """Says that it has all layers, and lets only two be run."""

    def __getitem__(self, which: Any) -> Any:
        return list(self)[:2] if isinstance(which, slice) else super().__getitem__(which)


def test_a_pass_over_some_of_the_layers_is_an_error() -> None:
    model = build()
    cache = SlotCache.of(DynamicCache(config=model.config))
    with torch.no_grad():
        model(input_ids=prompt(8), past_key_values=cache, use_cache=True)
        model.model.layers.__class__ = Leaving
        with pytest.raises(RuntimeError, match=r"LlamaModel leaves out its last layers: .*cpu_kernels=False"):
            model(input_ids=prompt(1), past_key_values=cache, use_cache=True)


def test_something_between_two_layers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    second, own = model.model.layers[1], torch.nn.Module.__call__

    def changed(self: Any, hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
        return own(self, hidden + 1 if self is second else hidden, *args, **kwargs)

    said(model)
    monkeypatch.setattr(type(second), "__call__", changed)
    with pytest.raises(RuntimeError, match=r"changes what its layers are given .*cpu_kernels=False"):
        said(model)


def test_two_threads_at_once() -> None:
    model = build()
    expected = said(plain(model))[0].logits
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(10):
            results.append(said(model)[0].logits)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for each in results:
        alike(each, expected)


def test_it_is_taken_out_again() -> None:
    model = build()
    cpu.remove(model)
    assert not any("forward" in vars(module) for module in model.modules())


LISTENERS: dict[str, Callable[[Any], Any]] = {
    "model": lambda model: model.register_forward_hook(lambda *_: None),
    "decoder": lambda model: model.model.register_forward_pre_hook(lambda *_: None),
    "embedding": lambda model: model.model.embed_tokens.register_forward_hook(lambda *_: None),
    "rotary": lambda model: model.model.rotary_emb.register_forward_hook(lambda *_: None),
    "norm": lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    "layer": lambda model: model.model.layers[1].register_forward_hook(lambda *_: None),
    "part of a layer": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None),
    "another forward": lambda model: setattr(model, "forward", lambda *_, **__: None),
}


class TestStraight:
    """Logits without what transformers does around the layers."""

    def test_are_the_models(self) -> None:
        model = build()
        ours, rows = said(model, straight=True)
        expected, others = said(model)
        alike(ours, expected.logits)
        alike(rows.layers[2].values, others.layers[2].values)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_of_a_copy_are_the_copys(self, copied: Callable[[Any], Any]) -> None:
        model = build()
        other = copied(model)
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        assert stack_of(other).model is other
        alike(said(other, straight=True)[0], said(other)[0].logits)

    def test_are_those_of_other_embeddings(self) -> None:
        model = build()
        model.resize_token_embeddings(model.config.vocab_size + 7)
        alike(said(model, straight=True)[0], said(model)[0].logits)

    @pytest.mark.parametrize("visible", [True, False])
    def test_of_a_token_behind_padding_are_not_had(self, visible: bool) -> None:
        model = build()
        cache, mask = SlotCache.of(DynamicCache(config=model.config)), torch.ones(1, 9, dtype=torch.bool)
        with torch.no_grad():
            model(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            mask[0, 0] = visible
            ours = stack_of(model).logits(prompt(1), mask, torch.tensor([[8]]), cache)
            if not visible:
                assert ours is None
                return
            cache.keep([8], [()])
            alike(ours, model(input_ids=prompt(1), past_key_values=cache, use_cache=True).logits)

    @pytest.mark.parametrize("where", LISTENERS)
    def test_are_not_had_where_somebody_listens(self, where: str) -> None:
        model = build()
        cache = SlotCache.of(DynamicCache(config=model.config))
        with torch.no_grad():
            model(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            LISTENERS[where](model)
            assert stack_of(model).logits(prompt(1), None, torch.tensor([[8]]), cache) is None
        assert cache.lengths == [8]

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer"])
    def test_are_not_had_where_somebody_changed_the_code(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build()
        kinds = {type(module).__name__: type(module) for module in model.modules()}
        cache = SlotCache.of(DynamicCache(config=model.config))
        with torch.no_grad():
            model(input_ids=prompt(8), past_key_values=cache, use_cache=True)
            changed = "__call__" if name == "LlamaDecoderLayer" else "forward"
            monkeypatch.setattr(kinds[name], changed, lambda *_, **__: None)
            assert stack_of(model).logits(prompt(1), None, torch.tensor([[8]]), cache) is None

    @pytest.mark.parametrize("more", ["logits", "embeddings"])
    def test_are_not_had_where_the_model_does_more(self, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
        own = {"logits": LlamaForCausalLM.forward, "embeddings": LlamaModel.forward}[more]

        def logits(self: Any, **inputs: Any) -> Any:
            output = own(self, **inputs)
            output.logits = 2 * output.logits
            return output

        def embeddings(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
            inputs["inputs_embeds"] = 2 * self.embed_tokens(input_ids)
            return own(self, **inputs)

        if more == "logits":
            monkeypatch.setattr(LlamaForCausalLM, "forward", logits)
        else:
            monkeypatch.setattr(LlamaModel, "forward", embeddings)
        model = build()
        assert stack_of(model).model is None
        alike(said(model)[0].logits, said(plain(model))[0].logits)

    def test_a_generation_asks_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, own, had = build(), StraightPass.logits, list[bool]()

        def noted(self: StraightPass, *given: Any) -> Any:
            result = own(self, *given)
            had.append(result is not None)
            return result

        monkeypatch.setattr(StraightPass, "logits", noted)
        asked = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        expected = plain(model).generate(prompt(8), **asked)
        with specdec.speculating(model, NgramDrafter(), FixedPolicy(4, 4, 1)):
            had.clear()
            assert model.generate(prompt(8), **asked).tolist() == expected.tolist()
            assert had
            assert all(had)
