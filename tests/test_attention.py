"""Tree passes through our own attention: the same logits as through the model's, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from specdec import attention
from specdec.attach import _forms, attach
from specdec.core import DraftTree, Unsupported
from specdec.kernels.tree_attention import visible
from specdec.masks import Layout, additive, tree_bits, tree_mask
from specdec.model import Form, Model
from tests import tiny
from tests.test_masks import passes, tree

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8}
# Whether masks go by layer type, whether the model's own are added to scores; then the architecture.
MODELS: dict[str, tuple[bool, bool, str, dict[str, Any]]] = {
    "llama": (False, False, "Llama", {}),
    "llama-eager": (False, True, "Llama", {"attn_implementation": "eager"}),
    "mistral": (False, False, "Mistral", {"sliding_window": 6}),
    "gemma2": (True, True, "Gemma2", {"sliding_window": 6, "head_dim": 8, "attn_implementation": "eager"}),
    "gemma3": (True, False, "Gemma3Text", MIXED),
    "gpt-oss": (True, True, "GptOss", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": (
        True, False, "Llama4Text",
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8,
         "moe_layers": [], "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
}  # fmt: skip
BATCHES = {"alone": {"input_ids": tiny.prompt(12)}, "padded": tiny.padded(12, 5, 9)}
HOLED = {"input_ids": tiny.prompt(12), "attention_mask": torch.tensor([[1] * 4 + [0] * 3 + [1] * 5])}


def build(name: str, **changes: Any) -> Any:
    """A random model; every matrix is drawn anew, wide enough for clear choices."""
    *_, kind, given = MODELS[name]
    return tiny.build(kind, **{**given, **changes})


def spelt(parents: Sequence[int], seed: int) -> DraftTree:
    tokens = np.random.default_rng(seed).integers(3, tiny.VOCAB, len(parents))
    return DraftTree(tokens, np.array(parents), np.ones(len(parents), np.float32), ("",) * len(parents))


def logits(module: Any, form: Form, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What three tree passes say about every node, rows growing apart between them."""
    found = []

    def loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        model_kwargs = {
            name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria")
        }
        target = Model(model, form)
        target.start(input_ids, generation_config, model_kwargs)
        rows = len(input_ids)
        for step, keep in enumerate(([0, 2, 4], [0, 1], [0])):
            shapes = [[-1, 0, 0, 2, 2, 4, 5, 6, 7], [-1, 0, 1], [-1, 0, 0, 1, 3]]
            trees = [spelt(shapes[(row + step) % 3], row) for row in range(rows)]
            out = target.forward(trees).logits
            found.extend(out[row, : len(each)] for row, each in enumerate(trees))
            target.keep([keep if row == 0 and step == 0 else keep[: 1 + step % 2] for row in range(rows)])
        return input_ids

    module.generate(**batch, max_new_tokens=64, custom_generate=loop)
    return torch.cat(found)


def forms(name: str) -> tuple[Form, Form, Form]:
    """A model's own form, and those by our attention."""
    per_type, additive, *_ = MODELS[name]
    ours = (Form("tree", per_type, attention="mask"), Form("tree", per_type, attention="bits"))
    return Form("tree", per_type, additive), *ours


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(name: str, batch: str) -> None:
    """Windows narrower than the tree is deep, chunks, soft caps, sinks, padding, and rows of different lengths."""
    model = build(name)
    own, *ours = forms(name)
    wanted = logits(model, own, BATCHES[batch])
    for form in ours:
        torch.testing.assert_close(
            logits(model, form, BATCHES[batch]), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
        )


def test_a_mask_with_holes_is_not_told_in_bits() -> None:
    model = build("llama")
    own, *ours = forms("llama")
    wanted = logits(model, own, HOLED)
    for form in ours:
        torch.testing.assert_close(logits(model, form, HOLED), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_whole_generations_by_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.attach.likely", lambda module, config: "bits")
    monkeypatch.setattr("specdec.cache.GROWTH", 8)
    model = build(name)
    assert attach(model).form.attention == "bits"
    tiny.same(model, tiny.padded(12, 5), max_new_tokens=40, eos_token_id=None)


@given(passes())
@settings(max_examples=200, deadline=None)
def test_bits_say_what_the_mask_says(case: dict[str, Any]) -> None:
    shapes, lengths, offset = case["shapes"], case["lengths"], case["offset"]
    width = max(map(len, shapes)) + case["filler"]
    columns = max(lengths) - offset + width
    shown = None
    if case["padding"] is not None:
        shown = torch.arange(case["columns"])[None] >= torch.tensor(case["padding"])[:, None]
    layout = Layout.of([tree(shape) for shape in shapes], width)
    bits = tree_bits(layout, lengths, case["reach"], offset, shown)[:, 0]
    dense = visible(bits[:, :, :-2], bits[:, 0, -2], bits[:, :, -1], columns)
    assert torch.equal(dense, tree_mask(layout, lengths, case["reach"], columns, offset, shown))


class TestWhatIsRefused:
    """What our attention does not know how to do, it does not do."""

    def call(self, **arguments: Any) -> Any:
        q, kv = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8)
        mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
        return attention.attention(torch.nn.Identity(), q, kv, kv, **{"attention_mask": mask, **arguments})

    def test_what_it_does(self) -> None:
        out, weights = self.call(position_bias=None, sliding_window=4, is_causal=True)
        assert out.shape == (1, 3, 4, 8)
        assert weights is None

    @pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "cache", "sinks", "seq_idx"])
    def test_unknown_arguments(self, name: str) -> None:
        with pytest.raises(Unsupported, match=name):
            self.call(**{name: torch.ones(2)})

    def test_dropout(self) -> None:
        with pytest.raises(Unsupported, match="dropout"):
            self.call(dropout=0.1)

    def test_a_mask_per_head(self) -> None:
        with pytest.raises(Unsupported, match="one mask"):
            self.call(attention_mask=torch.ones(1, 4, 3, 9, dtype=torch.bool))

    def test_a_model_that_asks_for_more_keeps_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention, "HARMLESS", set())  # Mistral's layers name their window
        form = attach(build("mistral")).form
        assert (form.level, form.attention) == ("tree", "own")


class TestTheSwitch:
    """The implementation is named in the model's config, for as long as a tree pass takes."""

    def test_it_is_put_back(self) -> None:
        config = build("llama").config
        with attention.switched(config):
            assert config._attn_implementation == "specdec"
        assert config._attn_implementation == "sdpa"
        with pytest.raises(AttributeError), attention.switched(config):
            config.nothing  # noqa: B018
        assert config._attn_implementation == "sdpa"

    def test_both_registries_know_it(self) -> None:
        with attention.switched(build("llama").config):
            assert attention.NAME in AttentionInterface()
            assert attention.NAME in AttentionMaskInterface()

    @pytest.mark.parametrize("nodes", [1, 3, 9])
    def test_a_plain_pass_that_began_before_it(self, nodes: int) -> None:
        """It may come with no mask, which means the causal one, or with one to be added to scores."""
        q, k, v = torch.randn(1, 4, nodes, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
        causal = torch.ones(1, 1, nodes, 9, dtype=torch.bool).tril(9 - nodes)
        wanted = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True).transpose(1, 2)
        for mask in (None, causal, additive(causal, q.dtype)):
            got, _ = attention.attention(torch.nn.Identity(), q, k, v, mask)
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize("name", MODELS)
    def test_a_plain_generation_meanwhile(self, name: str) -> None:
        """What another thread asks of the model during a tree pass comes out the same."""
        model = build(name)
        for batch in BATCHES.values():
            plain = model.generate(**batch, max_new_tokens=12, do_sample=False)
            with attention.switched(model.config):
                assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), plain)

    def test_threads_take_turns(self) -> None:
        model = build("llama")
        form = forms("llama")[2]
        wanted = logits(model, form, BATCHES["alone"])
        started = threading.Barrier(2)

        def run(_: int) -> torch.Tensor:
            started.wait()
            return torch.stack([logits(model, form, BATCHES["alone"]) for _ in range(10)])

        with ThreadPoolExecutor(2) as pool:
            for results in pool.map(run, range(2)):
                torch.testing.assert_close(results, wanted.expand_as(results))
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "changes", "chosen"),
    [
        ("llama", {}, "mask"),
        ("gemma3", {}, "mask"),
        ("llama", {"num_key_value_heads": 4}, "own"),
        ("llama-eager", {}, "own"),
        ("gpt-oss", {}, "own"),
    ],
)
def test_what_is_chosen_on_the_cpu(name: str, changes: dict[str, Any], chosen: str) -> None:
    assert attach(build(name, **changes)).form.attention == chosen


def test_a_compiled_model_keeps_its_own() -> None:
    model = build("llama")
    assert any(form.attention != "own" for form in _forms(model))
    model.forward = torch.compile(model.forward)
    assert all(form.attention == "own" for form in _forms(model))


def test_attention_without_masks_has_trees_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert _forms(model) == [Form("chain")]
    monkeypatch.setattr("specdec.attach.likely", lambda module, config: "bits")
    assert _forms(model) == [Form("tree", True, attention="bits"), Form("chain")]
