"""The target's own layers as the drafter: they say what those layers say, and the target is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import specdec
from specdec import cpu
from specdec.core import Budget, Context
from specdec.drafters import EarlyExitDrafter, early_exit
from specdec.drafters.early_exit import with_layers
from specdec.drafters.model_rows import Rows
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import VOCAB, padded, prompt, same

MODELS = {
    "Llama": lambda: tiny.model(num_hidden_layers=4),
    "GPTNeoX": lambda: tiny.model("GPTNeoX", num_hidden_layers=4),
    "Qwen3": lambda: tiny.model(
        "Qwen3",
        num_hidden_layers=4,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny.model(num_hidden_layers=4)


def drafter(model: Any, layers: int | Sequence[int], **more: Any) -> EarlyExitDrafter:
    return EarlyExitDrafter(model, layers, **{"cpu_kernels": False, **more})


def skipping(model: Any, kept: Sequence[int]) -> Any:
    """A copy of a model whose other layers do nothing."""
    model = copy.deepcopy(model)
    layers = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    for number, layer in enumerate(layers):
        if number not in kept:
            layer.forward = lambda hidden, *rest, **more: hidden
    return model


class TestLayers:
    @pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 3], [1, 2], [0, 1, 2, 3]])
    @pytest.mark.parametrize("kind", MODELS)
    @torch.no_grad()
    def test_say_what_the_model_says_without_the_others(self, kind: str, kept: list[int]) -> None:
        model, ids = MODELS[kind](), prompt(rows=2)
        wanted = skipping(model, kept)(ids, use_cache=False).logits
        torch.testing.assert_close(with_layers(model, kept)(ids).logits, wanted)

    @torch.no_grad()
    def test_share_the_targets_weights_and_leave_it_as_it_was(self, target: Any) -> None:
        before, ids = target(prompt()).logits, {id(part) for part in target.modules()}
        shallow = with_layers(target, [0, 3])
        assert {p.data_ptr() for p in shallow.parameters()} <= {p.data_ptr() for p in target.parameters()}
        assert not {id(part) for part in shallow.modules()} & ids
        assert [layer.self_attn.layer_idx for layer in target.model.layers] == [0, 1, 2, 3]
        assert (target.config.num_hidden_layers, shallow.config.num_hidden_layers) == (4, 2)
        assert torch.equal(target(prompt()).logits, before)

    @torch.no_grad()
    def test_speak_through_a_lens(self, target: Any) -> None:
        torch.manual_seed(0)
        lens = nn.Linear(32, 32)
        hidden = target.model.norm(target(prompt(), output_hidden_states=True).hidden_states[2])
        assert torch.allclose(
            with_layers(target, [0, 1], lens)(prompt()).logits, target.lm_head(lens(hidden)), atol=1e-5
        )


class TestDrafts:
    def test_of_all_layers_are_always_right(self, target: Any) -> None:
        with specdec.speculating(target, drafter(target, 4), FixedPolicy(4, 4, 4)):
            target.generate(prompt(), max_new_tokens=31, min_new_tokens=31, do_sample=False)
            assert specdec.stats(target).tokens_per_step == pytest.approx(31 / 7)

    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("layers", [3, (0, 1, 3)])
    def test_leave_output_as_it_is(self, target: Any, layers: Any, sample: bool) -> None:
        for batch in ({"input_ids": prompt()}, padded(9, 4, 12, 7)):
            result = same(
                target, batch, drafter=drafter(target, layers, tree="best-first"), max_new_tokens=40, do_sample=sample
            )
            assert result.stats.accepted > 0
            assert set(result.stats.by_drafter) == {"early-exit"}

    def test_of_a_target_with_quicker_layers(self) -> None:
        model = tiny.model(num_hidden_layers=4)
        plain = model.generate(prompt(), max_new_tokens=30, do_sample=False)
        specdec.wrap(model, "recycling", cpu_kernels=True)
        shallow = drafter(model, (0, 2), cpu_kernels=True)
        assert not any(part is other for part in shallow.model.modules() for other in model.modules())
        specdec.wrap(model, shallow, FixedPolicy(4, 4, 4))
        assert model.generate(prompt(), max_new_tokens=30, do_sample=False).tolist() == plain.tolist()
        assert specdec.stats(model).fault_count == 0
        specdec.unwrap(model)
        assert not cpu.installed(model)

    def test_are_sampled_where_the_verifier_weighs_them(self, target: Any) -> None:
        with specdec.speculating(target, drafter(target, 3, tree="rsd-s"), FixedPolicy(12, 4, 4), verifier="rejection"):
            torch.manual_seed(0)
            target.generate(prompt(), max_new_tokens=30, do_sample=True, top_k=0)
            assert specdec.stats(target).by_rule["traversal"] > 5
            assert specdec.stats(target).fault_count == 0


class TestRows:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("layers", [3, (0, 2)])
    def test_are_the_targets_so_that_nothing_is_read_twice(
        self, target: Any, layers: Any, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fed, run = list[int](), Rows._pass
        monkeypatch.setattr(
            Rows, "_pass", lambda *given, **more: fed.append(len(given[1][0].tokens)) or run(*given, **more)
        )
        plain = target.generate(prompt(rows=rows), max_new_tokens=30, do_sample=False)
        with specdec.speculating(target, drafter(target, layers), FixedPolicy(4, 4, 4), cpu_kernels=False):
            assert target.generate(prompt(rows=rows), max_new_tokens=30, do_sample=False).tolist() == plain.tolist()
            stats = specdec.stats(target)
        assert fed.count(1) > 10
        assert max(fed) == 1  # the root, and then one guess after the other
        assert stats.accepted > 0
        assert not stats.reasons
        assert stats.fault_count == 0

    def test_of_its_own_say_the_same_of_first_layers(self, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        drafted = []
        for reason in ("", "not today"):
            monkeypatch.setattr(early_exit, "unfit", lambda target, reason=reason: reason)
            with specdec.speculating(target, drafter(target, 3, tree="beam"), FixedPolicy(8, 4, 4), cpu_kernels=False):
                target.generate(prompt(rows=2), max_new_tokens=30, do_sample=False)
                stats = specdec.stats(target)
            drafted.append((stats.drafted, stats.accepted, stats.steps))
            assert stats.fault_count == 0
        assert drafted[0] == drafted[1]

    def test_of_its_own_where_prompts_are_padded(self, target: Any) -> None:
        result = same(target, padded(9, 4), drafter=drafter(target, 3), max_new_tokens=20, do_sample=False)
        assert result.stats.accepted > 0


class TestNames:
    def test_of_layers_of_the_model_that_is_wrapped(self, target: Any) -> None:
        with specdec.speculating(target, "early-exit:4", FixedPolicy(4, 4, 4), cpu_kernels=False):
            target.generate(prompt(), max_new_tokens=11, min_new_tokens=11, do_sample=False)
            assert specdec.stats(target).tokens_per_step == pytest.approx(11 / 3)

    @pytest.mark.parametrize("name", ["early-exit:4", "early-exit:few"])
    def test_that_cannot_be_made(self, name: str) -> None:
        with pytest.raises(ValueError, match="give wrap"):
            specdec.Speculate(name)

    @pytest.mark.parametrize("layers", [0, 5, (1, 0), (0, 0), (0, 7), ()])
    def test_no_such_layers(self, target: Any, layers: Any) -> None:
        with pytest.raises(ValueError, match="at least one of 0 to 3"):
            EarlyExitDrafter(target, layers)

    def test_a_drafter_of_its_own_config_knows_its_vocabulary(self, target: Any) -> None:
        [tree] = drafter(target, 2).draft([Context([5, 6, 7])], [Budget(4, 4, 4)])
        assert 1 < len(tree) <= 5
        assert tree.tokens.max() < VOCAB
