"""A drafter of one layer: what it says is what its layer says of the whole text, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec import Memory, storage
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import LongSpecDrafter, MergedDrafter, NgramDrafter
from specdec.drafters.lent import Lent
from specdec.drafters.longspec import Window
from specdec.drafters.longspec_layer import KIND, VERSION, LongSpecLayer
from specdec.policies import FixedPolicy
from specdec.speculate import make_drafter
from tests import tiny

WINDOW = 8
TREES = ("chain", "beam", "best-first")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def layer(model: Any) -> LongSpecLayer:
    """Not trained, but different in all its parts from any of the target's."""
    torch.manual_seed(1)
    layer = LongSpecLayer.of(model, WINDOW)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return layer


class Noted(LongSpecDrafter):
    """Remembers what it drafted behind which text."""

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        trees = super().draft(contexts, budgets)
        pairs = zip(contexts, trees, strict=True)
        self.noted = [*getattr(self, "noted", []), *((context.tokens.copy(), tree) for context, tree in pairs)]
        return trees


def rows_of(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a text in the last layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[None], past_key_values=cache)
    return cache.layers[-1].keys[0], cache.layers[-1].values[0]


@torch.no_grad()
def chance(model: Any, layer: LongSpecLayer, text: np.ndarray, path: Sequence[int]) -> float:
    """A path's probability behind a text: each token's by the layer over all tokens before, as it is trained."""
    lent, whole = Lent(model, layer.kept), torch.tensor([*text.tolist(), *path])
    keys, values = rows_of(model, whole)
    x, rotation = lent.embed(whole), lent.rotation(torch.arange(len(whole)))
    product = 1.0
    for depth, token in enumerate(path):
        after = layer(x, rotation, keys, values, blind=depth + 1)[len(text) - 1 + depth]
        product *= float(lent.logits(after[None]).softmax(-1)[0, token])
    return product


class TestWhatItSays:
    @pytest.mark.parametrize("tree", TREES)
    def test_is_what_its_layer_says_in_training(self, model: Any, layer: LongSpecLayer, tree: Any) -> None:
        drafter = Noted(layer, tree, width=3, cpu_kernels=False)
        tiny.same(model, {"input_ids": tiny.prompt(30)}, drafter=drafter, max_new_tokens=6)
        assert any(len(tree) > 4 for _, tree in drafter.noted)
        self.check(model, layer, drafter)

    def test_with_a_head_of_keys_for_each_of_queries(self) -> None:
        target = tiny.model(num_key_value_heads=4)
        layer = LongSpecLayer.of(target, WINDOW)
        drafter = Noted(layer, "best-first", cpu_kernels=False)
        tiny.same(target, {"input_ids": tiny.prompt(30)}, drafter=drafter, max_new_tokens=6)
        self.check(target, layer, drafter)

    def test_in_a_padded_batch(self, model: Any, layer: LongSpecLayer) -> None:
        drafter = Noted(layer, "best-first", cpu_kernels=False)
        tiny.same(model, tiny.padded(14, 5, 11), drafter=drafter, max_new_tokens=6, eos_token_id=[5, 9, 30])
        self.check(model, layer, drafter)

    def test_after_other_drafters_steps(self, model: Any, layer: LongSpecLayer) -> None:
        drafter = Noted(layer, cpu_kernels=False)
        policy = FixedPolicy(3, 3, 1)
        policy.budget = lambda contexts: [  # type: ignore[method-assign]
            Budget(3, 3, 1) if len(context.tokens) % 3 == 0 else Budget(0, 0, 0) for context in contexts
        ]
        with specdec.speculating(model, drafter, policy):
            model.generate(tiny.prompt(20), max_new_tokens=16)
        assert sum(len(tree) > 1 for _, tree in drafter.noted) > 2
        self.check(model, layer, drafter)

    def check(self, model: Any, layer: LongSpecLayer, drafter: Noted) -> None:
        for text, tree in drafter.noted[:4]:
            for node in range(1, len(tree)):
                path, at = list[int](), node
                while at > 0:
                    path.insert(0, int(tree.tokens[at]))
                    at = int(tree.parents[at])
                assert tree.probability[node] == pytest.approx(chance(model, layer, text, path), rel=1e-3, abs=1e-7)


class TestOutput:
    @pytest.mark.parametrize("tree", TREES)
    @pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
    def test_is_plain_generates(self, model: Any, tree: Any, sample: bool) -> None:
        drafter = LongSpecDrafter(LongSpecLayer.of(model, WINDOW), tree, cpu_kernels=False)
        arguments = {"input_ids": tiny.prompt(40), "do_sample": sample, "top_k": 5}
        result = tiny.same(model, arguments, drafter=drafter, max_new_tokens=60)
        assert result.stats.drafted > 100

    @pytest.mark.slow
    @pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one to one"])
    def test_at_8k(self, heads: int) -> None:
        target = tiny.model(num_key_value_heads=heads, max_position_embeddings=1 << 14)
        drafter = LongSpecDrafter(LongSpecLayer.of(target, WINDOW), "best-first", cpu_kernels=False)
        arguments = {"input_ids": tiny.prompt(8000), "max_new_tokens": 40, "min_new_tokens": 40}
        result = tiny.same(target, arguments, drafter=drafter)
        assert result.stats.drafted > 100

    @pytest.mark.parametrize("kind", ["Qwen3", "Gemma3Text", "Phi3"])
    def test_of_other_kinds_of_models(self, kind: str) -> None:
        more: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]} if "Gemma" in kind else {}
        target = tiny.build(kind, head_dim=8, **more)
        drafter = LongSpecDrafter(LongSpecLayer.of(target, WINDOW))
        result = tiny.same(target, {"input_ids": tiny.prompt(20)}, drafter=drafter, max_new_tokens=20)
        assert result.stats.drafted > 0, result.stats.reasons


class TestMemory:
    def test_rows_are_those_of_a_text_never_drafted_behind(
        self, model: Any, layer: LongSpecLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        follow, seen = Window.follow, list[int]()

        def checked(self: Window, tokens: np.ndarray) -> Window:
            before, first = (self.keys, self.values), self.end - self.keys.shape[1]
            follow(self, tokens)
            fresh = follow(Window(self.layer, self.lent, self.target, self.row), tokens)
            gone = self.end - self.keys.shape[1] - first
            for rows, old in zip((self.keys, self.values), before, strict=True):
                still = old[:, max(0, gone) :]
                assert torch.equal(rows[:, : still.shape[1]], still)
            torch.testing.assert_close(self.keys, fresh.keys, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(self.values, fresh.values, atol=1e-6, rtol=1e-6)
            seen.append(self.keys.shape[1])
            return self

        monkeypatch.setattr(Window, "follow", checked)
        drafter = LongSpecDrafter(layer, "best-first", cpu_kernels=False)
        result = tiny.same(model, {"input_ids": tiny.prompt(4)}, drafter=drafter, max_new_tokens=30)
        assert result.stats.accepted < result.stats.drafted
        assert seen[0] == 4
        assert max(seen) == seen[-1] == WINDOW - 1

    def test_is_constant_in_the_context(self, model: Any, layer: LongSpecLayer) -> None:
        held = set[int]()

        class Weighed(LongSpecDrafter):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                trees = super().draft(contexts, budgets)
                for window in (context.scratch[self] for context in contexts if self in context.scratch):
                    held.add(window.bytes)
                    assert not window.targets[0].is_contiguous()  # a view of the target's own buffers
                return trees

        for length in (200, 2000):
            tiny.same(
                model, {"input_ids": tiny.prompt(length)}, drafter=Weighed(layer, cpu_kernels=False), max_new_tokens=4
            )
        assert held == {2 * 2 * (WINDOW - 1) * 8 * 4}  # keys and values of 2 heads, 8 wide, in float32


class TestFile:
    @pytest.fixture
    def path(self, layer: LongSpecLayer, tmp_path: Path) -> Path:
        layer.save(tmp_path / "layer.safetensors", "tiny")
        return tmp_path / "layer.safetensors"

    def test_says_all_there_is(self, model: Any, layer: LongSpecLayer, path: Path) -> None:
        loaded = LongSpecLayer.load(path)
        assert (loaded.shape, loaded.window, loaded.inner) == (layer.shape, WINDOW, 48)
        for name, weight in layer.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)
        assert isinstance(make_drafter(f"longspec:{path}", model), LongSpecDrafter)

    def test_of_another_target_is_refused(self, path: Path) -> None:
        with pytest.raises(ValueError, match="another target: hidden 32 and not 64"):
            specdec.wrap(tiny.model(hidden_size=64), f"longspec:{path}")
        with pytest.raises(ValueError, match="another target: vocab 97 and not 90"):
            LongSpecDrafter.load(path, tiny.model(vocab_size=90))

    def test_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        storage.write(tmp_path / "x", KIND + "!", VERSION, {}, {})
        with pytest.raises(ValueError, match="is a file of kind"):
            make_drafter(f"longspec:{tmp_path / 'x'}")

    def test_of_a_smaller_vocabulary_says_nothing_else(self, model: Any, tmp_path: Path) -> None:
        kept = torch.arange(3, 97, 5)
        LongSpecLayer.of(model, WINDOW, kept).save(tmp_path / "few", "tiny")
        drafter = Noted(LongSpecLayer.load(tmp_path / "few"), "best-first", cpu_kernels=False)
        tiny.same(model, {"input_ids": tiny.prompt(20)}, drafter=drafter, max_new_tokens=10)
        said = {token for _, tree in drafter.noted for token in tree.tokens[1:].tolist()}
        assert len(said) > 1
        assert said <= set(kept.tolist())
        TestWhatItSays().check(model, drafter.layer, drafter)


class TestBind:
    def test_says_why_not(self, layer: LongSpecLayer) -> None:
        sliding = tiny.build("Mistral", sliding_window=16)
        drafter = LongSpecDrafter(LongSpecLayer.of(sliding, WINDOW))
        for target, wanted, why in (
            (sliding, drafter, "last layer does not look back without limit"),
            (tiny.gpt2(), LongSpecDrafter(layer), "trained for another target"),
        ):
            with tiny.quietly():
                result = tiny.same(target, {"input_ids": tiny.prompt(9)}, drafter=wanted, max_new_tokens=5)
            assert result.stats.drafted == 0
            assert any(why in reason for reason in result.stats.reasons), result.stats.reasons

    def test_reaches_parts_of_a_merged_drafter_and_of_a_memory(self, model: Any, layer: LongSpecLayer) -> None:
        for drafter in (
            MergedDrafter([NgramDrafter(), LongSpecDrafter(layer)]),
            Memory(drafter=LongSpecDrafter(layer)),
        ):
            result = tiny.same(model, {"input_ids": tiny.prompt(30)}, drafter=drafter, max_new_tokens=20)
            assert result.stats.by_drafter["longspec"]["drafted"] > 0

    def test_is_not_there_where_no_part_has_one(self) -> None:
        assert MergedDrafter([NgramDrafter()]).bind is None
        assert Memory(drafter=NgramDrafter()).bind is None

    def test_of_a_merged_drafter_says_which_part_does_without(self, layer: LongSpecLayer) -> None:
        drafter = MergedDrafter([NgramDrafter(), LongSpecDrafter(layer, cpu_kernels=False)])
        with tiny.quietly():
            result = tiny.same(tiny.gpt2(), {"input_ids": tiny.prompt(9)}, drafter=drafter, max_new_tokens=5)
        assert any("longspec: the layer was trained" in reason for reason in result.stats.reasons)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="tree='iid'"):
        LongSpecDrafter(None, "iid")  # type: ignore[arg-type]
