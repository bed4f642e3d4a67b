"""What a model can take is found by trying, and whatever is found, the tokens are plain ``generate``'s."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import specdec
from specdec.attach import attach
from specdec.core import Budget, DraftTree
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import VOCAB, Oracle, padded, prompt, sequences, texts

POLICY = FixedPolicy(12, 5, 6)
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


# level, whether masks go by layer type, whether they are added; then the architecture
MODELS: dict[str, tuple[str, bool, bool, str, dict[str, Any]]] = {
    "llama": ("tree", False, False, "Llama", {}),
    "llama-eager": ("tree", False, True, "Llama", {"attn_implementation": "eager"}),
    "mistral": ("tree", False, False, "Mistral", {"sliding_window": 6}),
    "gemma2": ("tree", True, True, "Gemma2", {"sliding_window": 6, "head_dim": 8, "attn_implementation": "eager"}),
    "gemma3": ("tree", True, False, "Gemma3Text", MIXED),
    "gemma3-eager": ("tree", True, True, "Gemma3Text", {**MIXED, "attn_implementation": "eager"}),
    "qwen3": ("tree", True, False, "Qwen3", {**MIXED, "use_sliding_window": True}),
    "gpt-oss": ("tree", True, True, "GptOss", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": (
        "tree", True, False, "Llama4Text",
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8,
         "moe_layers": [], "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
    "mixtral": ("tree", False, False, "Mixtral", {"num_local_experts": 4}),
    "gpt-neox": ("tree", False, False, "GPTNeoX", {}),
    "gpt-j": ("tree", False, True, "GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "falcon": ("tree", False, False, "Falcon", {"alibi": False}),
    "falcon-alibi": ("chain", False, False, "Falcon", {"alibi": True}),
    "bloom": ("chain", False, False, "Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("chain", False, False, "Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "use_cache": True}),
    "gpt-neo": (
        "chain", False, False, "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    "mamba2": (
        "chain", False, False, "Mamba2",
        {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "lfm2": ("chain", False, False, "Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "qwen3-next": (
        "chain", False, False, "Qwen3Next",
        {"layer_types": ["linear_attention", "full_attention"], **LINEAR, "head_dim": 8, "num_experts": 2,
         "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "mamba": ("plain", False, False, "Mamba", {"state_size": 4}),
    "recurrent-gemma": (
        "plain", False, False, "RecurrentGemma",
        {"attention_window_size": 6, "lru_width": 32, "num_hidden_layers": 3, "head_dim": 8},
    ),
}  # fmt: skip


class Whole(Oracle):
    """Guesses as much of the truth as its budget's depth allows, and then something wrong."""

    def tree(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        true = self.known(tokens)[: max(0, budget.depth - 1)].tolist()
        guesses = [*true, 5][: budget.depth if budget.nodes else 0]
        return DraftTree.chain(int(tokens[-1]), guesses, [1.0] * len(guesses), "whole")


CALLS = [
    {"max_new_tokens": 16, "eos_token_id": None, **batch, **arguments}
    for batch in ({"input_ids": prompt(12)}, padded(12, 5))
    for arguments in ({}, {"do_sample": True, "top_k": 20})
]


def call(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**arguments)


@pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name: str) -> None:
    level, per_type, additive, kind, changes = MODELS[name]
    model = tiny.build(kind, **changes)
    form = attach(model).form
    assert (form.level, form.per_type, form.additive) == (level, per_type, additive)
    assert bool(form.reason) == (level != "tree")
    plain = [call(model, each) for each in CALLS]
    known = [row for each, out in zip(CALLS, plain, strict=True) for row in texts(out, each.get("attention_mask"))]
    with specdec.speculating(model, (Oracle if level == "tree" else Whole)(known), POLICY):
        for each, out in zip(CALLS, plain, strict=True):
            assert call(model, each).tolist() == out.tolist()
        stats = specdec.stats(model)
    assert stats.level == level
    assert (stats.accepted > 0) == (level != "plain")
    assert stats.plain_generations == (len(CALLS) if level == "plain" else 0)
    assert bool(stats.reasons) == (level != "tree")


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral"])
def test_windows_and_chunks_many_times_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cache.GROWTH", 8)
    *_, kind, changes = MODELS[name]
    for batch in ({"input_ids": prompt(12)}, padded(12, 5)):
        tiny.same(tiny.build(kind, **changes), batch, max_new_tokens=60, eos_token_id=None)


HONEST = transformers.LlamaForCausalLM.forward


def lying(lie: str) -> Any:
    """A Llama that does not do with several tokens, or with masks, what it does with single ones."""

    @functools.wraps(HONEST)
    def forward(self: Any, **inputs: Any) -> Any:
        mask, cache = inputs.get("attention_mask"), inputs["past_key_values"]
        several = inputs["input_ids"].shape[1] > 1 and cache.get_seq_length() > 0
        if lie == "masks" and mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = None
        if lie == "positions" and several:
            inputs["position_ids"] = inputs["position_ids"][:, :1].expand_as(inputs["position_ids"])
        output = HONEST(self, **inputs)
        if lie == "order" and several:
            output.logits = output.logits.flip(1)
        if lie == "noise":
            output.logits = output.logits + torch.randn_like(output.logits)
        return output

    liar = type("Liar", (transformers.LlamaForCausalLM,), {"forward": forward})
    torch.manual_seed(0)
    return liar(transformers.LlamaConfig(**tiny.SIZES)).eval()


class TestAModelThatLies:
    """What it does with several tokens at once is compared with single ones."""

    def test_about_masks_it_gets_chains(self) -> None:
        model = lying("masks")
        found = attach(model)
        assert found.form.level == "chain"
        assert "logits differ" in found.form.reason
        plain = model.generate(prompt(), max_new_tokens=20)
        with specdec.speculating(model, Whole(texts(plain)), POLICY):
            with pytest.warns(specdec.SpecdecWarning, match="chains only"):
                ours = model.generate(prompt(), max_new_tokens=20)
            assert ours.tolist() == plain.tolist()
            assert specdec.stats(model).accepted > 0

    @pytest.mark.parametrize("lie", ["positions", "order", "noise"])
    def test_about_anything_else_it_is_refused(self, lie: str) -> None:
        model = lying(lie)
        assert attach(model).form.level == "plain"
        with (
            specdec.speculating(model, on_unsupported="error"),
            pytest.raises(ValueError, match=r"takes no drafts.*logits differ"),
        ):
            model.generate(prompt())
        plain = call(model, {"inputs": prompt(), "max_new_tokens": 9})
        with specdec.speculating(model):
            with pytest.warns(specdec.SpecdecWarning, match="takes no drafts"):
                model.generate(prompt(), max_new_tokens=9)
            assert call(model, {"inputs": prompt(), "max_new_tokens": 9}).tolist() == plain.tolist()


class TestAttaching:
    def test_the_model_and_the_random_state_are_left_as_they_were(self) -> None:
        model = tiny.model()
        before = copy.deepcopy(model.state_dict()), model.generation_config.to_dict(), dict(vars(model))
        torch.manual_seed(3)
        state = torch.get_rng_state()
        attach(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.generation_config.to_dict() == before[1]
        assert vars(model).keys() == before[2].keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[0][name])

    def test_passes_are_timed(self) -> None:
        costs = attach(tiny.model()).costs
        assert costs is not None
        assert all(0 < each < 1 for each in costs.times(32, 0))

    def test_once_for_each_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setattr("specdec.speculate.attach", lambda model: calls.append(model) or attach(model))
        loop, models = specdec.Speculate(Oracle(), POLICY), [tiny.model(), tiny.gpt2()]
        for model in models * 2:
            model.generate(prompt(), max_new_tokens=4, custom_generate=loop)
        assert calls == models

    def test_not_before_it_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setattr("specdec.speculate.attach", lambda model: calls.append(model))
        model = specdec.wrap(tiny.model())
        with tiny.quietly():
            model.generate(prompt(), num_beams=2, max_new_tokens=3)
        assert calls == []

    def test_anew_where_the_attention_is_another(self) -> None:
        model = tiny.model()
        plain = model.generate(prompt(), max_new_tokens=20)
        specdec.wrap(model, Oracle(texts(plain)), POLICY, on_unsupported="error")
        for attention in ("sdpa", "eager", "sdpa"):
            model.set_attn_implementation(attention)
            assert model.generate(prompt(), max_new_tokens=20).tolist() == plain.tolist()
        assert specdec.stats(model).accepted > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_other_precisions(self, dtype: torch.dtype, attention: str) -> None:
        model = tiny.model(attn_implementation=attention, initializer_range=0.2).to(dtype)
        with specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"):
            output = model.generate(prompt(), max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
            assert specdec.stats(model).level == "tree"
        assert all(torch.isfinite(logits).all() for logits in output.logits)
        if dtype is torch.float64:
            assert sequences(output).tolist() == model.generate(prompt(), max_new_tokens=6).tolist()

    def test_a_small_vocabulary(self) -> None:
        model = tiny.model(vocab_size=3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        ids = torch.tensor([[0, 1, 2, 2, 1]])
        tiny.same(model, {"input_ids": ids}, drafter="auto", max_new_tokens=20)

    def test_the_text_part_of_a_multimodal_model_is_what_counts(self) -> None:
        """Sizes, windows and positions are read from it."""
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        text = {name: value for name, value in tiny.SIZES.items() if name != "initializer_range"} | MIXED
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        torch.manual_seed(0)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.4)
        tiny.same(model, {"input_ids": prompt() % (VOCAB - 4)}, max_new_tokens=20, eos_token_id=None)
