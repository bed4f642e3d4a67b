"""Whole decoder layers in two calls: the model's own logits and texts, and its own pass wherever ours is not."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import DynamicCache

import specdec
from specdec import cpu
from specdec.cache import SlotCache
from specdec.policies import FixedPolicy
from specdec.short_layer import ShortLayer, fits
from specdec.short_stack import ShortStack
from tests.tiny import Oracle, padded, prompt, quick_layers, same
from tests.tiny import model as tiny_model

WHOLE: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Mistral": {"sliding_window": 10, "head_dim": 32},
    "Qwen2": {"hidden_size": 128},  # biases of queries, keys and values
    "Qwen3": {
        "head_dim": 80,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 10,
    },
    "Glm4Moe": {"head_dim": 32, "first_k_dense_replace": 2, "partial_rotary_factor": 0.5, "use_qk_norm": True},
    "Granite": {"head_dim": 16},  # multipliers of one
}
NOT: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 16, "hidden_act": "gelu"},
    "Granite": {"head_dim": 16, "residual_multiplier": 0.5},
    "SmolLM3": {"hidden_size": 128, "no_rope_layers": [1, 0]},
    "Gemma": {"head_dim": 16},  # norms by 1 + weight
    "Helium": {"hidden_size": 64, "head_dim": 16},  # pairs of neighbours are turned
    "Ernie4_5": {"head_dim": 16},
    "Ministral3": {"head_dim": 16},  # scores grow with the position, far beyond what a short proof sees
    "Cohere": {"hidden_size": 128},
    "StableLm": {"hidden_size": 128},
    "Olmo2": {"hidden_size": 128},
}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with quick_layers(monkeypatch):
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How many passes of ours each layer has made, by itself or with the others."""
    counts: Counter[Any] = Counter()
    single, together = ShortLayer._run, ShortStack.through

    def counted(self: ShortLayer, *args: Any) -> Any:
        counts[self.layer] += 1
        return single(self, *args)

    def all_counted(self: ShortStack, *args: Any) -> Any:
        counts.update(layer.layer for layer in self.layers)
        return together(self, *args)

    monkeypatch.setattr(ShortLayer, "_run", counted)
    monkeypatch.setattr(ShortStack, "through", all_counted)
    return counts


def build(kind: str = "Llama", **changes: Any) -> Any:
    """A random model whose layers ours can stand in for, its norms and biases random too."""
    model = tiny_model(kind, **{**WHOLE[kind], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return model


def quick(model: Any) -> Any:
    """The model with our layers."""
    assert cpu.install(model) == ""
    assert whole(model)
    return model


def whole(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(vars(layer).get("forward"), ShortLayer)]


@torch.no_grad()
def logits(model: Any, rows: int = 1, nodes: int = 3) -> torch.Tensor:
    """Of a prompt, padded on the left where there are several rows, and of ``nodes`` more tokens."""
    inputs, cache = padded(*range(9, 9 - 2 * rows, -2)), DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = model(**inputs, past_key_values=cache, use_cache=True).logits[mask.bool()]
    more = torch.cat([mask, torch.ones(rows, nodes, dtype=torch.long)], 1)
    second = model(input_ids=prompt(nodes, rows, 1), attention_mask=more, past_key_values=cache, use_cache=True).logits
    assert ids.shape[1] + nodes == more.shape[1]
    return torch.cat([first, second.flatten(0, 1)])


def alike(ours: torch.Tensor, own: torch.Tensor) -> None:
    """Equal up to rounding, and numbers."""
    assert ours.isfinite().all()
    assert (ours - own).abs().max() <= cpu.TOLERANCE * (own - own.mean(-1, keepdim=True)).abs().max()


@pytest.mark.parametrize("kind", WHOLE)
class TestNumbers:
    def test_short_passes(self, kind: str, runs: Counter[Any]) -> None:
        model = build(kind)
        sizes = [(rows, nodes) for rows in (1, 2, 3, 4) for nodes in (1, 2, 7, 20)]
        own = [logits(model, *size) for size in sizes]
        layers = whole(quick(model))
        runs.clear()
        for size, expected in zip(sizes, own, strict=True):
            alike(logits(model, *size), expected)
        assert set(runs) == set(layers)
        assert min(runs.values()) == 2 * len(sizes) - 4  # one prompt alone has no mask, and is not ours

    def test_ragged_trees(self, kind: str, runs: Counter[Any]) -> None:
        if "sliding_window" in WHOLE[kind]:
            pytest.skip("its masks are the verifier's to make: see the next test")
        model = build(kind)
        own = self._tree(model)
        quick(model)
        runs.clear()
        alike(self._tree(model), own)
        assert sum(runs.values()) == 2

    @staticmethod
    @torch.no_grad()
    def _tree(model: Any) -> torch.Tensor:
        """Of a tree of five nodes behind rows of unequal length."""
        cache = SlotCache.of(DynamicCache(config=model.config))
        first = model(input_ids=prompt(8, 3), past_key_values=cache, use_cache=True).logits
        cache.keep([0, 0, 0], [list(range(n)) for n in (8, 5, 2)])
        mask = torch.zeros(3, 1, 5, 13, dtype=torch.bool)
        tree = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
        for row, n in enumerate((8, 5, 2)):
            mask[row, 0, :, :n] = True
            mask[row, 0, :, n : n + 5] = tree.bool()
        positions = torch.tensor([[8], [5], [2]]) + torch.tensor([[0, 1, 1, 2, 2]])
        tree_inputs = {"input_ids": prompt(5, 3, 1), "attention_mask": mask, "position_ids": positions}
        return torch.cat([first, model(**tree_inputs, past_key_values=cache, use_cache=True).logits], 1)

    @pytest.mark.parametrize("sampled", [False, True])
    def test_texts_with_the_kernels_alone(self, kind: str, sampled: bool, runs: Counter[Any]) -> None:
        model, arguments = build(kind), {"max_new_tokens": 12, "do_sample": sampled, **padded(9, 5)}
        torch.manual_seed(0)
        plain = model.generate(**arguments)
        quick(model)
        runs.clear()
        torch.manual_seed(0)
        assert torch.equal(model.generate(**arguments), plain)
        assert min(runs.values()) == 12

    def test_texts_with_drafts_too(self, kind: str, runs: Counter[Any]) -> None:
        model, arguments = build(kind), {"max_new_tokens": 20, "do_sample": False, **padded(9, 5)}
        plain = model.generate(**arguments)
        own = Oracle([row[m:].tolist() for row, m in zip(plain, (0, 4), strict=True)])
        specdec.wrap(model, own, FixedPolicy(12, 5, 6), on_unsupported="error", cpu_kernels=True)
        runs.clear()
        assert torch.equal(model.generate(**arguments), plain)
        assert specdec.stats(model).accepted > 0
        assert specdec.stats(model).level == "tree"
        assert len(runs) == 2
        specdec.unwrap(model)
        assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("kind", NOT)
def test_other_layers_keep_their_own_pass(kind: str) -> None:
    model = tiny_model(kind, **NOT[kind])
    own, tried = logits(model), any(map(fits, model.modules()))
    assert bool(cpu.install(model)) == tried
    assert whole(model) == []
    alike(logits(model), own)


def test_what_a_proof_by_numbers_might_miss_does_not_fit() -> None:
    layer = build().model.layers[0]
    assert fits(layer)
    for spoil in (
        lambda it: setattr(it.post_attention_layernorm, "variance_epsilon", 2e-6),
        lambda it: setattr(it.self_attn, "sinks", nn.Parameter(torch.full((4,), -50.0))),
        lambda it: setattr(it.mlp, "act_fn", nn.GELU()),
        lambda it: it.mlp.register_buffer("limit", torch.tensor(1e9)),
        lambda it: setattr(it.self_attn.v_proj, "weight", nn.Parameter(torch.zeros(16, 32))),
        lambda it: setattr(it.self_attn, "head_dim", 2),
        lambda it: setattr(it, "mlp", nn.Identity()),
        lambda it: it.half(),
    ):
        other = copy.deepcopy(layer)
        assert fits(other)
        spoil(other)
        assert not fits(other)


def test_a_mask_for_all_rows_alike(runs: Counter[Any]) -> None:
    model = build()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]

    @torch.no_grad()
    def run() -> torch.Tensor:
        inputs = {"input_ids": prompt(9, 2), "attention_mask": mask}
        return model(**inputs, past_key_values=DynamicCache(config=model.config), use_cache=True).logits

    own = run()
    quick(model)
    runs.clear()
    alike(run(), own)
    assert runs


class TestItsOwnPass:
    """Where somebody else has a say, the layer's own pass runs."""

    @staticmethod
    def _falls_back(model: Any, own: torch.Tensor, runs: Counter[Any], layers: int = 2) -> None:
        runs.clear()
        alike(logits(model), own)
        assert len(runs) == 2 - layers

    def test_hooks_are_called(self, runs: Counter[Any]) -> None:
        model = quick(build())
        own = logits(model)
        calls: list[str] = []
        for part, register in (("self_attn", "register_forward_hook"), ("mlp.gate_proj", "register_forward_pre_hook")):
            module = model.model.layers[0].get_submodule(part)
            handle = getattr(module, register)(lambda *_, part=part: calls.append(part))
            self._falls_back(model, own, runs, 1)
            assert calls == [part] * 2
            calls.clear()
            handle.remove()
        self._falls_back(model, own, runs, 0)

    def test_a_forward_of_somebody_elses_is_called(self, runs: Counter[Any]) -> None:
        model = quick(build())
        model.model.layers[1].mlp.forward = lambda x: torch.zeros_like(x)
        ours = logits(model)
        cpu.remove(model)
        alike(ours, logits(model))
        assert "forward" in vars(model.model.layers[1].mlp)

    def test_gradients(self) -> None:
        model = build()
        model(prompt()).logits.sum().backward()
        own = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        quick(model)(prompt()).logits.sum().backward()
        for parameter, expected in zip(model.parameters(), own, strict=True):
            torch.testing.assert_close(parameter.grad, expected)

    def test_training(self, runs: Counter[Any]) -> None:
        model = quick(build(attention_dropout=0.5))
        runs.clear()
        model.train()
        assert not torch.equal(logits(model), logits(model))
        assert not runs

    def test_autocast_and_eager(self, runs: Counter[Any]) -> None:
        model = build()
        with torch.autocast("cpu", torch.bfloat16):
            own = logits(model)
        exact = logits(model)
        quick(model)
        with torch.autocast("cpu", torch.bfloat16):
            self._falls_back(model, own, runs)
        other = copy.deepcopy(model)
        for each in (model, other):
            each.set_attn_implementation("eager")
            self._falls_back(each, exact, runs)

    def test_adapters_put_on_later(self, runs: Counter[Any]) -> None:
        model, plain = quick(build()), build()
        own = logits(model)
        for each in (model, plain):
            torch.manual_seed(1)
            adapter = peft.LoraConfig(
                target_modules=["q_proj", "down_proj"], init_lora_weights=False, layers_to_transform=[0]
            )
            peft.inject_adapter_in_model(adapter, each)
        expected = logits(plain)
        assert not torch.allclose(expected, own)
        self._falls_back(model, expected, runs, 1)

    def test_arguments_by_position(self) -> None:
        x, turn, mask = torch.randn(1, 1, 32), torch.randn(1, 1, 16), torch.tensor([[[[True, False, True]]]])
        own, ours = build(), quick(build())

        @torch.no_grad()
        def run(model: Any) -> torch.Tensor:
            cache = DynamicCache(config=model.config)
            model(prompt(2), past_key_values=cache)
            return model.model.layers[0](x, mask, past_key_values=cache, position_embeddings=(turn, turn))

        alike(run(ours), run(own))


class TestWeights:
    """What lies in a layer is what counts, however it got there."""

    def test_nothing_is_copied(self) -> None:
        model = quick(build())
        for layer in whole(model):
            ours = layer.forward
            assert ours.wq.ctypes.data == layer.self_attn.q_proj.weight.data_ptr()
            assert ours.bd.ctypes.data == layer.mlp.down_proj.bias.data_ptr()

    def test_what_the_model_lets_go_of_is_freed(self) -> None:
        model = quick(build())
        logits(model)
        held = weakref.ref(model.model.layers[0].mlp.up_proj.weight.untyped_storage())
        model.to(torch.bfloat16)
        gc.collect()
        assert held() is None

    @pytest.mark.parametrize("way", ["copied", "assigned", "data", "bias", "turned", "moved and back"])
    def test_replaced(self, way: str, runs: Counter[Any]) -> None:
        model, other = quick(build()), build()
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.mul_(1.5) if way != "bias" or name.endswith("bias") else None
        for name, parameter in model.named_parameters():
            new = other.get_parameter(name).data
            if way in ("data", "bias"):
                parameter.data = new.clone()
            elif way == "turned":
                parameter.data = new.T.contiguous().T if new.ndim == 2 else new.clone()
        if way in ("copied", "assigned"):
            model.load_state_dict(other.state_dict(), assign=way == "assigned")
        elif way == "moved and back":
            model.double().float().load_state_dict(other.state_dict())
        runs.clear()
        alike(logits(model), logits(other))
        assert len(runs) == (0 if way == "turned" else 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_another_type(self, dtype: torch.dtype, runs: Counter[Any]) -> None:
        model, plain = quick(build()).to(dtype), build().to(dtype)
        runs.clear()
        assert torch.equal(logits(model), logits(plain))
        assert not runs
        assert cpu.install(build().to(dtype)) == ""

    def test_on_no_device(self) -> None:
        model = build().to("meta")
        assert cpu.install(model) == ""
        assert not any("forward" in vars(layer) for layer in model.modules())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_has_its_own(self, copied: Any, runs: Counter[Any]) -> None:
        model = quick(build())
        own = logits(model)
        other = copied(model)
        alike(logits(other), own)
        with torch.no_grad():
            for parameter in other.model.layers.parameters():
                parameter.zero_()
        runs.clear()
        assert not torch.allclose(logits(other), own)
        assert set(runs) == set(whole(other)) == set(other.model.layers)
        alike(logits(model), own)
        cpu.remove(other)
        assert len(whole(model)) == 2

    def test_a_pickle_has_them_once(self) -> None:
        model = build()
        plain = len(pickle.dumps(model))
        assert len(pickle.dumps(quick(model))) < 1.2 * plain


@pytest.mark.parametrize("models", [1, 2])
def test_threads_may_generate_at_once(models: int) -> None:
    arguments = {"max_new_tokens": 12, "do_sample": False}
    each = [build(head_dim=16 * (i + 1)) for i in range(models)]
    plain = [model.generate(prompt(), **arguments) for model in each]
    for model in each:
        quick(model)
    right: list[bool] = []

    def work(i: int) -> None:
        for _ in range(5):
            right.append(torch.equal(each[i].generate(prompt(), **arguments), plain[i]))

    threads = [threading.Thread(target=work, args=(i % models,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 15


def test_torchs_number_of_threads_is_taken() -> None:
    model = build()
    own = logits(model, 2)
    quick(model)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        alike(logits(model, 2), own)
        assert model.model.layers[0].forward.shared._last[2][3] == threads


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}])
def test_all_that_generate_returns(arguments: dict[str, Any], runs: Counter[Any]) -> None:
    told = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True, **padded(9, 5)}
    model = build()
    own = model.generate(**told, **arguments, max_new_tokens=6, do_sample=False)
    quick(model)
    runs.clear()
    ours = model.generate(**told, **arguments, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.sequences, own.sequences)
    alike(torch.stack(ours.logits), torch.stack(own.logits))
    for step, expected in zip(ours.hidden_states, own.hidden_states, strict=True):
        assert len(step) == len(expected) == 3
        alike(torch.stack(step)[:, 0], torch.stack(expected)[:, 0])
    assert bool(runs) == (arguments.get("use_cache", True))


def test_attentions_of_an_eager_model(runs: Counter[Any]) -> None:
    model = build(attn_implementation="eager")
    told = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 4, "do_sample": False}
    own = model.generate(prompt(), **told)
    cpu.install(model)
    ours = model.generate(prompt(), **told)
    torch.testing.assert_close(ours.attentions[-1][1], own.attentions[-1][1])
    assert not runs


def test_once_hidden_states_were_asked_for_passes_stay_short(runs: Counter[Any]) -> None:
    model = quick(build())
    with torch.no_grad():
        model(prompt(), output_hidden_states=True)
    runs.clear()
    logits(model)
    assert len(runs) == 2


def test_a_compiled_model() -> None:
    model = build()
    own = logits(model)
    quick(model)
    model.model.layers[0].compile(backend="eager")
    model.lm_head.compile(backend="eager")
    alike(logits(model), own)


def test_sampling_with_drafts_is_seed_exact() -> None:
    model = quick(build("Qwen3"))
    same(model, {"inputs": prompt(), "max_new_tokens": 20, "do_sample": True})


def test_kernels_are_there_again_after_a_block_of_other_speculation() -> None:
    target = tiny_model("Llama", head_dim=16)
    specdec.wrap(target, cpu_kernels=True)
    with specdec.speculating(target, cpu_kernels=False):
        assert not cpu.installed(target)
    assert cpu.installed(target)
    assert not cpu.installed(specdec.unwrap(target))


def test_layers_that_would_not_run_are_not_replaced() -> None:
    """Nothing would be proved: eager attention is not ours to stand in for."""
    target = tiny_model("Llama", head_dim=16)
    target.set_attn_implementation("eager")
    assert "would not run" in cpu.install(target)
    assert all(not isinstance(vars(layer).get("forward"), ShortLayer) for layer in target.modules())


def test_on_by_default_and_off_on_demand() -> None:
    target = tiny_model("Llama", head_dim=16)
    assert cpu.installed(specdec.wrap(target))
    assert not cpu.installed(specdec.wrap(target, cpu_kernels=False))


def test_a_refusal_is_told_where_kernels_were_asked_for() -> None:
    target = tiny_model("Granite", head_dim=16, residual_multiplier=0.5)
    assert not specdec.stats(specdec.wrap(target)).reasons
    with pytest.warns(specdec.SpecdecWarning, match="keep their own passes"):
        specdec.wrap(target, cpu_kernels=True)
    assert specdec.stats(target).reasons
