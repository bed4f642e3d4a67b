"""Rows that begin alike: attention by parts against attention over all, rows held once, prompts read once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.utils import GenerationMixin

import specdec
from specdec import cpu, shared_prefix, speculate
from specdec.attention import SHARED, switched
from specdec.core import Context, DraftTree
from specdec.drafters import NgramDrafter, TriForceDrafter
from specdec.kernels import shared_prefix_torch
from specdec.kernels.shared_prefix import shared_prefix_attention
from specdec.model import Model
from specdec.policies import FixedPolicy
from specdec.shared_prefix import SharedCache, beginning, share
from specdec.short_layer import ShortLayer
from tests import tiny
from tests.long_context import started
from tests.shared_prefix_cases import EXTRAS, SHAPES, assert_same, shared_case
from tests.tiny import Oracle, prompt, same, texts


class TestKernel:
    def numbers(self, *shape: Any, **more: Any) -> dict[str, Any]:
        """The torch twin reads what it masks: slots hold numbers, as a cache's do."""
        given = shared_case(*shape, **more)
        return given | {name: given[name].nan_to_num(0) for name in ("k", "v")}

    @pytest.mark.parametrize("extra", EXTRAS)
    @pytest.mark.parametrize("prefix", [1, 65])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_torch(self, shape: tuple[int, list[int]], prefix: int, extra: str) -> None:
        assert_same(self.numbers(*shape, prefix=prefix, heads=6, kv_heads=2), "torch", extra)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 80), (8, 1, 96), (9, 3, 64)])
    def test_in_other_shapes(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        assert_same(
            self.numbers(2, [5, 1], prefix=33, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype), "torch", "sinks"
        )

    def test_a_long_prefix_is_read_piece_by_piece(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given, sizes = self.numbers(3, [4, 2], prefix=300), list[int]()
        part = shared_prefix_torch._part
        monkeypatch.setattr(shared_prefix_torch, "SCORES", 1)
        monkeypatch.setattr(
            shared_prefix_torch, "_part", lambda scores, values: sizes.append(scores.shape[-1]) or part(scores, values)
        )
        assert_same(given, "torch")
        assert sizes[1:] == [64, 64, 64, 64, 44]

    def test_g14(self) -> None:
        parts = [
            shared_prefix_torch._part(torch.tensor([scores]), torch.tensor(values)[:, None])
            for scores, values in (([1.0, 2.0, 0.5], [1.0, 2.0, 3.0]), ([3.0], [4.0]))
        ]
        assert float(parts[0].top + parts[0].total.log()) == pytest.approx(2.464369, abs=1e-6)
        assert float(parts[0].sums / parts[0].total) == pytest.approx(1.909020, abs=1e-6)
        whole = shared_prefix_torch._merged(*parts)
        assert float(whole.sums / whole.total) == pytest.approx(3.228001, abs=1e-6)

    def test_what_does_not_fit_is_refused(self) -> None:
        given = self.numbers(2, [3, 3], prefix=8)
        with pytest.raises(ValueError, match="one row of heads"):
            shared_prefix_attention(**{**given, "shared_k": given["shared_k"].expand(2, -1, -1, -1)})
        with pytest.raises(ValueError, match="impl is 'flash'"):
            shared_prefix_attention(**given, impl="flash")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Any:
    """Two heads of keys for four of queries."""
    return tiny.model()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """However short, beginnings are shared; how many tokens in each generation."""
    found: list[int] = []

    def noted(*parts: Any) -> int:
        found.append(share(*parts))
        return found[-1]

    monkeypatch.setattr(shared_prefix, "LEAST", 4)
    monkeypatch.setattr(speculate, "share", noted)
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of prompts as they are read, plain ``generate``'s among them."""
    shapes, own = list[tuple[int, ...]](), GenerationMixin._prefill

    def noted(self: Any, ids: torch.Tensor, *parts: Any, **more: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return own(self, ids, *parts, **more)

    monkeypatch.setattr(GenerationMixin, "_prefill", noted)
    return shapes


def ragged(common: int, *lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of some lengths that begin with ``common`` tokens alike, padded on the left."""
    batch = tiny.padded(*lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for row, n in enumerate(lengths):
        ids[row, -n:][:common] = prompt(common, seed=9)
    return {"input_ids": ids, "attention_mask": mask}


NEW = {"max_new_tokens": 24, "min_new_tokens": 24}


class TestGenerate:
    @pytest.mark.parametrize("kernels", [False, True])
    def test_several_sequences(self, shared: list[int], read: list[tuple[int, ...]], kernels: bool) -> None:
        """With the layers that the CPU's kernels stand in for, and without."""
        model = tiny.model(intermediate_size=64, head_dim=16)
        arguments = {"input_ids": prompt(20), "do_sample": True, "num_return_sequences": 3, "temperature": 0.7, **NEW}
        torch.manual_seed(0)
        plain = model.generate(**arguments)
        with specdec.speculating(model, Oracle(plain.tolist()), FixedPolicy(12, 5, 6), cpu_kernels=kernels):
            model.generate(**{**arguments, "max_new_tokens": 1})  # the self-test reads prompts of its own
            read.clear()
            torch.manual_seed(0)
            assert model.generate(**arguments).tolist() == plain.tolist()
            assert specdec.stats(model).tokens_per_step > 1.5
            assert all(isinstance(vars(layer).get("forward"), ShortLayer) == kernels for layer in model.model.layers)
        assert shared[-1] == 20
        assert read == [(1, 20)]

    @pytest.mark.parametrize(("lengths", "sample"), [((20, 20), True), ((14, 20, 11), True), ((11, 10, 30, 10), False)])
    def test_prompts_that_begin_alike(
        self, model: Any, shared: list[int], lengths: tuple[int, ...], sample: bool
    ) -> None:
        same(model, {**ragged(10, *lengths), **NEW}, do_sample=sample, repetition_penalty=1.2)
        assert shared == [10]

    def test_when_rows_end_one_by_one(self, model: Any, shared: list[int]) -> None:
        same(model, ragged(10, 14, 20, 11), max_new_tokens=30, eos_token_id=[5, 9, 30, 44, 70])
        assert shared == [10]

    @pytest.mark.parametrize("how", ["plain steps", "chains"])
    def test_steps_of_one_form(self, model: Any, shared: list[int], how: str) -> None:
        """Single tokens too go through our attention, which alone knows of the common beginning."""
        batch = {"input_ids": prompt(12).expand(3, -1), **NEW}
        plain = model.generate(**batch)
        policy = FixedPolicy(0, 0, 0) if how == "plain steps" else FixedPolicy(4, 4, 1)
        with specdec.speculating(model, NgramDrafter(), policy):
            assert model.generate(**batch).tolist() == plain.tolist()
        assert shared == [12]

    @pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one to one"])
    def test_by_bits(self, heads: int, shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        """As on GPUs, whose masks are a few words for each node."""
        monkeypatch.setattr("specdec.attach.likely", lambda module, config: "bits")
        model = tiny.model(num_key_value_heads=heads)
        same(model, {**ragged(10, 14, 20, 11), **NEW})
        same(model, {"input_ids": prompt(12), "num_return_sequences": 3, "do_sample": True, **NEW})
        assert shared == [10, 12]

    def test_in_half_precision(self, shared: list[int]) -> None:
        """Rounding may turn a choice; most tokens stay."""
        model = tiny.model().to(torch.bfloat16)
        result = tiny.both(model, {**ragged(10, 14, 20), **NEW}, drafter=NgramDrafter())
        assert (result.ours == result.plain).float().mean() > 0.5
        assert shared == [10]


class TestWhereNothingIsShared:
    def check(self, model: Any, shared: list[int], arguments: dict[str, Any], **more: Any) -> None:
        same(model, {**arguments, **NEW}, **more)
        assert not any(shared)

    def test_short_beginnings(self, model: Any, shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.check(model, shared, ragged(3, 14, 20))
        monkeypatch.setattr(shared_prefix, "LEAST", 11)
        self.check(model, shared, ragged(10, 14, 20))

    def test_a_single_row(self, model: Any, shared: list[int]) -> None:
        self.check(model, shared, {"input_ids": prompt(20)})

    def test_rows_that_are_to_be_returned(self, model: Any, shared: list[int]) -> None:
        batch = {"input_ids": prompt(20).expand(2, -1), "return_dict_in_generate": True, **NEW}
        result = same(model, batch)
        assert not shared
        for ours, plain in zip(result.ours.past_key_values.layers, result.plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, plain.keys, rtol=0, atol=1e-4)

    def test_a_drafter_that_reads_the_targets_rows(self, model: Any, shared: list[int]) -> None:
        batch = {"input_ids": prompt(20).expand(2, -1)}
        drafter = TriForceDrafter(NgramDrafter(), budget=16, chunk=4)
        self.check(model, shared, batch, drafter=drafter)
        assert not shared

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [("Mistral", {"sliding_window": 6}), ("Llama", {"attn_implementation": "eager"})],
    )
    def test_models_of_other_kinds_read_copies_of_a_prompt_once_all_the_same(
        self, kind: str, changes: dict[str, Any], shared: list[int], read: list[tuple[int, ...]]
    ) -> None:
        self.check(tiny.model(kind, **changes), shared, {"input_ids": prompt(20).expand(3, -1)})
        assert read[-1] == (1, 20)

    def test_somebody_listens_to_the_models_parts(self, model: Any, read: list[tuple[int, ...]]) -> None:
        rows: set[int] = set()
        hook = model.model.layers[0].register_forward_pre_hook(lambda part, inputs: rows.add(len(inputs[0])))
        try:
            same(model, {"input_ids": prompt(20).expand(3, -1), **NEW})
        finally:
            hook.remove()
        assert read[-1] == (3, 20)
        assert rows == {1, 3}  # the self-test's, and no others

    def test_inputs_that_differ(self, model: Any, read: list[tuple[int, ...]]) -> None:
        positions = torch.stack([torch.arange(20), torch.arange(20) + 3])
        same(model, {"input_ids": prompt(20).expand(2, -1), "position_ids": positions, **NEW})
        assert read[-1] == (2, 20)


class TestRows:
    def held(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[Model, list[Context]]:
        target = started(model, **batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return target, [Context(text) for text in texts(batch["input_ids"], mask)]

    def test_are_held_once(self, model: Any, shared: list[int]) -> None:
        target, contexts = self.held(model, {"input_ids": prompt(100).expand(16, -1)})
        one = target.cache.bytes_of_token * 100  # type: ignore[union-attr]
        spare = target.cache.bytes_of_token * shared_prefix.GROWTH * 16  # type: ignore[union-attr]
        assert share(target, contexts, [0] * 16) == 100
        assert isinstance(target.cache, SharedCache)
        assert target.cache.bytes == one + spare
        for layer in target.cache.layers:
            assert sum(x.untyped_storage().nbytes() for x in layer.shared) == one / len(target.cache.layers)

    @staticmethod
    def bytes_of(target: Model) -> list[torch.Tensor]:
        """All that is held, row by row: each row's own tokens, then what all begin with."""
        rows = [
            slots[row, :, : length - layer.offset].clone()
            for layer in target.cache.layers
            for slots in layer.buffers
            for row, length in enumerate(layer.lengths)
        ]
        return rows + [slots.clone() for layer in target.cache.layers for slots in layer.shared]

    def test_a_rejected_tree_leaves_no_trace(self, model: Any, shared: list[int]) -> None:
        """What paths have kept is what was fed without the other nodes."""
        batch = ragged(10, 14, 20, 11)
        padding = [6, 0, 9]
        tree = DraftTree(np.array([7, 8, 9, 10, 11]), np.array([-1, 0, 0, 1, 2]), np.ones(5, np.float32), ("",) * 5)
        target, contexts = self.held(model, batch)
        assert share(target, contexts, padding) == 10
        before = self.bytes_of(target)
        target.forward([tree] * 3)
        target.keep([[]] * 3)
        assert all(map(torch.equal, self.bytes_of(target), before))
        target.forward([tree] * 3)
        target.keep([[0, 2, 4], [0], []])
        other, contexts = self.held(model, batch)
        share(other, contexts, padding)
        chain = DraftTree.chain(7, [9, 11], [1.0, 1.0], "")
        other.forward([chain] * 3)
        other.keep([[0, 1, 2], [0], []])
        assert target.lengths == other.lengths == [17, 21, 11]
        for ours, theirs in zip(target.cache.layers, other.cache.layers, strict=True):
            for row, length in enumerate(target.lengths):
                held = (x[row, :, : length - 10] for x in (ours.keys, theirs.keys))
                torch.testing.assert_close(*held, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kernels", [False, True])
    def test_their_logits_are_those_of_rows_apart(self, shared: list[int], kernels: bool) -> None:
        model = tiny.model(intermediate_size=64, head_dim=16)
        if kernels:
            cpu.install(model)
        batch, padding = ragged(10, 14, 20, 11), [6, 0, 9]
        (target, contexts), (apart, _) = self.held(model, batch), self.held(model, batch)
        share(target, contexts, padding)
        trees = [DraftTree.chain(5 + row, range(40, 40 + row), [1.0] * row, "") for row in range(3)]
        for _ in range(2):
            ours, theirs = (each.forward(trees).logits for each in (target, apart))
            for row in range(3):
                torch.testing.assert_close(ours[row, : row + 1], theirs[row, : row + 1], rtol=0, atol=1e-4)
            target.keep([range(row + 1) for row in range(3)])
            apart.keep([range(row + 1) for row in range(3)])

    def test_beginnings(self) -> None:
        def common(*texts: list[int]) -> int:
            return beginning([np.array(text) for text in texts])

        assert common([1, 2, 3], [1, 2, 3]) == 3
        assert common([1, 2, 3], [1, 2], [1, 2, 4]) == 2
        assert common([1, 2, 3], [2, 2, 3]) == 0
        assert common([1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4]) == 2

    def test_another_threads_pass_does_not_meet_them(self, model: Any) -> None:
        """The switch is seen by all threads; whose rows are shared is not."""
        seen = []
        with switched(model.config, SharedCache(layers=[])):
            thread = threading.Thread(target=lambda: seen.append(SHARED.get()))
            thread.start()
            thread.join()
            assert isinstance(SHARED.get(), SharedCache)
        assert seen == [None]
        assert SHARED.get() is None
