"""Three levels, and the target's own text and law at the end of them, whatever the two below guess."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec.core import Budget, Choice, Context, DraftTree
from specdec.drafters import (
    NgramDrafter,
    RecyclingDrafter,
    SmallModelDrafter,
    SuffixDrafter,
    TriForceDrafter,
    middle,
    triforce,
    triforce_worth,
)
from specdec.drafters.middle import Middle
from specdec.drafters.triforce_worth import Worth
from specdec.policies import FixedPolicy
from specdec.verifiers import RejectionVerifier, rules
from tests import enumerated, sampling, tiny
from tests.tiny import padded, prompt, same

HEADS = {"grouped": 2, "one to one": 4}
HYBRID = tiny.hybrids(24)
POLICY = FixedPolicy(4, 4, 1)
LONG = 1100


@functools.cache
def model(heads: int = 2, **more: Any) -> Any:
    return tiny.model(num_key_value_heads=heads, max_position_embeddings=1 << 14, **more)


def blurred(by: float) -> Any:
    """A model that often agrees with the target."""
    rough, noise = tiny.model(max_position_embeddings=1 << 14), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in rough.parameters():
            weight += by * weight.std() * torch.randn(weight.shape, generator=noise) if weight.ndim > 1 else 0
    return rough


FIRSTS: dict[str, Any] = {
    "n-grams": NgramDrafter,
    "suffixes": SuffixDrafter,
    "recycling": RecyclingDrafter,
    "a model": lambda: SmallModelDrafter(blurred(0.05), "best-first", cpu_kernels=False),
    "a model with a window": lambda: SmallModelDrafter(blurred(0.05), window=128, cpu_kernels=False),
}


@pytest.fixture(autouse=True)
def at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are as deep as they may be; what they are worth is tested apart."""
    monkeypatch.setattr(Worth, "depth", lambda self, context, most, agreed, anew: most)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[Middle]:
    """Every middle level that is made."""
    made, begin = list[Middle](), Middle.__init__

    def noted(self: Middle, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Middle, "__init__", noted)
    return made


class Nothing:
    """Guesses nothing, and remembers what it was shown."""

    name, topk, hidden = "nothing", 0, False

    def __init__(self) -> None:
        self.ended: list[list[int]] = []

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        self.ended += [context.tokens.tolist() for context in contexts if context.finished]
        return [DraftTree.root(int(context.tokens[-1])) for context in contexts]


def test_by_name() -> None:
    made = specdec.Speculate("triforce").drafter
    assert isinstance(made, TriForceDrafter)
    assert isinstance(made.first, NgramDrafter)


class TestOutput:
    @pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
    @pytest.mark.parametrize("first", FIRSTS)
    def test_is_plain_generates(self, first: str, sample: bool, levels: list[Middle]) -> None:
        drafter = TriForceDrafter(FIRSTS[first](), budget=512)
        result = same(
            model(), {"input_ids": prompt(LONG)}, drafter=drafter, max_new_tokens=40, do_sample=sample, top_k=5
        )
        assert levels[0].builds > 0
        assert result.stats.by_drafter["triforce"]["accepted"] > 3

    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_for_heads_in_groups_and_one_to_one(self, heads: int, attention: str, levels: list[Middle]) -> None:
        target = tiny.model(num_key_value_heads=heads, attn_implementation=attention)
        drafter = TriForceDrafter(NgramDrafter(), budget=96, chunk=4)
        result = same(target, {"input_ids": prompt(200)}, drafter=drafter, max_new_tokens=60, repetition_penalty=1.2)
        assert levels[0].builds > 0
        assert result.stats.accepted > 5

    @pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
    @pytest.mark.parametrize("kind", HYBRID)
    def test_for_models_some_of_whose_layers_have_windows(self, kind: str, sample: bool, levels: list[Middle]) -> None:
        target, drafter = tiny.build(kind, **HYBRID[kind]), TriForceDrafter(NgramDrafter(), budget=96, chunk=4)
        result = same(target, padded(300, 280), drafter=drafter, max_new_tokens=40, do_sample=sample)
        assert all(level.builds > 0 for level in levels)
        assert result.stats.by_drafter["triforce"]["accepted"] > 5

    @pytest.mark.filterwarnings("ignore:.*takes drafts as chains only")
    @pytest.mark.parametrize("inputs", [{"input_ids": prompt(200)}, padded(300, 280)], ids=["alone", "with padding"])
    @pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
    @pytest.mark.parametrize("kind", tiny.RECURRENT)
    def test_for_models_some_of_whose_layers_have_recurrent_states(
        self, kind: str, sample: bool, inputs: Any, levels: list[Middle]
    ) -> None:
        target, drafter = tiny.build(kind, **tiny.RECURRENT[kind]), TriForceDrafter(NgramDrafter(), budget=96, chunk=4)
        result = same(target, inputs, drafter=drafter, max_new_tokens=40, do_sample=sample)
        assert all(level.builds > 0 for level in levels)
        assert result.stats.by_drafter["triforce"]["accepted"] > 0

    @pytest.mark.parametrize("first", ["n-grams", "a model"])
    def test_of_a_batch_with_padding(self, first: str, levels: list[Middle]) -> None:
        drafter = TriForceDrafter(FIRSTS[first](), budget=48, chunk=4)
        same(model(), padded(90, 70, 81), drafter=drafter, max_new_tokens=40, eos_token_id=[5, 9, 30])
        assert all(level.builds > 0 for level in levels)
        assert len(levels) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    def test_at_8k(self, heads: int, levels: list[Middle]) -> None:
        drafter = TriForceDrafter(NgramDrafter(), budget=6144)
        arguments = {"max_new_tokens": 60, "min_new_tokens": 60}
        result = same(model(heads), {"input_ids": prompt(8000)}, drafter=drafter, **arguments)
        assert levels[0].builds > 0
        assert result.stats.by_drafter["triforce"]["accepted"] > 5

    def test_where_the_rows_cannot_serve_is_that_of_first(self, levels: list[Middle]) -> None:
        target, drafter = tiny.model("Mistral", sliding_window=7), TriForceDrafter(NgramDrafter(), 16)
        with pytest.warns(specdec.SpecdecWarning, match="triforce does without the target: no layer .* without limit"):
            result = tiny.both(target, {"input_ids": prompt(60)}, drafter=drafter, max_new_tokens=60)
        assert result.ours.tolist() == result.plain.tolist()
        assert not levels
        assert set(result.stats.by_drafter) == {"ngram"}

    @pytest.mark.filterwarnings("ignore:.*takes drafts as chains only")
    @pytest.mark.parametrize(
        ("kind", "sizes"),
        [
            ("Bloom", {"n_layer": 2, "n_head": 4}),  # which reads positions off the columns of its mask
            ("Mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
        ],
    )
    def test_where_chains_alone_are_held_is_that_of_first(
        self, kind: str, sizes: dict[str, int], levels: list[Middle]
    ) -> None:
        target, drafter = tiny.build(kind, **sizes), TriForceDrafter(NgramDrafter(), 16)
        reason = "triforce does without the target: the target's cache holds neither trees nor rows without limit"
        with pytest.warns(specdec.SpecdecWarning, match=reason):
            result = tiny.both(target, {"input_ids": prompt(60)}, drafter=drafter, max_new_tokens=30)
        assert result.ours.tolist() == result.plain.tolist()
        assert any(reason in each for each in result.stats.reasons)
        assert not levels

    def test_where_rows_are_held_beyond_a_window_is_that_of_first(self, levels: list[Middle]) -> None:
        """In a cache of the user's, which knows of no windows."""
        target, drafter = tiny.build("Qwen2", **HYBRID["Qwen2"]), TriForceDrafter(NgramDrafter(), 16)
        with pytest.warns(specdec.SpecdecWarning, match="not held by the windows or chunks"):
            result = tiny.both(
                target,
                lambda: {"input_ids": prompt(60), "past_key_values": DynamicCache()},
                drafter=drafter,
                max_new_tokens=30,
            )
        assert result.ours.tolist() == result.plain.tolist()
        assert not levels

    def test_as_long_as_the_text_fits_the_budget_is_that_of_first(self, levels: list[Middle]) -> None:
        drafter = TriForceDrafter(NgramDrafter(), 128)
        result = same(model(), {"input_ids": prompt(100)}, drafter=drafter, max_new_tokens=90, min_new_tokens=90)
        assert levels[0].builds == 1
        assert set(result.stats.by_drafter) == {"ngram", "triforce"}

    def test_when_the_middle_level_fails(self, levels: list[Middle], monkeypatch: pytest.MonkeyPatch) -> None:
        calls, write = iter(range(99)), Middle.write

        def failing(self: Middle, *arguments: Any) -> Any:
            result = write(self, *arguments)
            return result if next(calls) < 5 else 1 // 0

        monkeypatch.setattr(Middle, "write", failing)
        drafter = TriForceDrafter(NgramDrafter(), 64)
        with pytest.warns(specdec.SpecdecWarning, match="triforce: raised ZeroDivisionError"):
            result = tiny.both(model(), {"input_ids": prompt(100)}, drafter=drafter, max_new_tokens=60)
        assert result.ours.tolist() == result.plain.tolist()
        assert result.stats.fault_count == 1
        assert next(calls) == 6


def run(drafter: Any, ids: torch.Tensor, policy: Any = POLICY, **arguments: Any) -> Any:
    """Statistics of a generation."""
    target = arguments.pop("target", None) or model()
    with specdec.speculating(target, drafter, policy, cpu_kernels=False):
        target.generate(ids, **{"min_new_tokens": 31, "max_new_tokens": 31, "do_sample": False, **arguments})
        return specdec.stats(target)


class TestLevels:
    def test_all_is_accepted_where_nothing_is_left_out(self, levels: list[Middle]) -> None:
        """65 tokens, 64 of them chosen and the rest kept: the middle level says what the target says."""
        stats = run(TriForceDrafter(Nothing(), budget=64), prompt(65))
        assert stats.tokens_per_step == pytest.approx(31 / 7)  # the prompt's own, and 6 of 5
        assert levels[0].passes == 24

    def test_all_is_accepted_of_a_sampled_text_too(self) -> None:
        drafter = TriForceDrafter(Nothing(), budget=64)
        target = model()
        with specdec.speculating(target, drafter, POLICY, verifier="rejection", cpu_kernels=False):
            torch.manual_seed(0)
            target.generate(prompt(65), do_sample=True, temperature=0.8, top_k=9, min_new_tokens=31, max_new_tokens=31)
            assert specdec.stats(target).tokens_per_step == pytest.approx(31 / 7)
            assert "block" in specdec.stats(target).by_rule

    def test_first_saves_passes_of_the_middle_level(self, levels: list[Middle]) -> None:
        twin = SmallModelDrafter(tiny.model(max_position_embeddings=1 << 14), cpu_kernels=False)
        stats = run(TriForceDrafter(twin, budget=64), prompt(65))
        assert stats.tokens_per_step == pytest.approx(31 / 7)
        assert levels[0].passes == 6

    def test_first_learns_what_was_committed_at_the_end(self, levels: list[Middle]) -> None:
        first, ids = Nothing(), prompt(300)
        with specdec.speculating(model(), TriForceDrafter(first, budget=32), POLICY):
            text = model().generate(ids, max_new_tokens=50)
        assert levels[0].passes > 0
        assert first.ended == text.tolist()

    def test_a_models_rows_stay_where_the_target_disagrees(self) -> None:
        small, fed = blurred(0.05), list[int]()
        small.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].numel()), with_kwargs=True)
        first = SmallModelDrafter(small, cpu_kernels=False)
        fed.clear()
        stats = run(TriForceDrafter(first, budget=64), prompt(600), max_new_tokens=60)
        assert stats.accepted < stats.drafted
        assert sum(fed) < 600 + 8 * stats.drafted

    def test_a_tree_where_there_is_room(self) -> None:
        sizes = {"budget": 560, "agreed": 0.0}, {"max_new_tokens": 120, "min_new_tokens": 120}
        chain = run(TriForceDrafter(Nothing(), **sizes[0]), prompt(600), **sizes[1])
        tree = run(TriForceDrafter(Nothing(), **sizes[0]), prompt(600), FixedPolicy(8, 4, 2), **sizes[1])
        assert tree.drafted > chain.drafted
        assert tree.tokens_per_step > chain.tokens_per_step > 1.5

    def test_built_anew_where_the_target_agrees_too_rarely(
        self, levels: list[Middle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for agreed, dear in ((0.9, math.inf), (0.9, 0.0), (0.0, 0.0)):
            monkeypatch.setattr(triforce_worth, "BUILDS", dear)
            run(TriForceDrafter(Nothing(), budget=16, agreed=agreed), prompt(300), max_new_tokens=150)
        assert 1 < levels[0].builds <= 1 + 150 // triforce_worth.PATIENCE < levels[1].builds
        assert levels[2].builds == 1
        monkeypatch.setattr(triforce, "LONGER", 40)
        run(TriForceDrafter(Nothing(), budget=16, agreed=0.0), prompt(300), max_new_tokens=150, min_new_tokens=150)
        assert levels[3].builds in (3, 4)

    def test_all_of_a_text_is_read_for_the_first_build_alone(
        self, levels: list[Middle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wholes, only_row = [], middle.only_row
        monkeypatch.setattr(middle, "only_row", lambda *which: wholes.append(only_row(*which)) or wholes[-1])
        monkeypatch.setattr(triforce, "LONGER", 10)
        run(TriForceDrafter(Nothing(), budget=64), prompt(300), max_new_tokens=50, min_new_tokens=50)
        assert levels[0].builds > 2
        assert len(wholes) == 1

    def test_rows_are_those_of_the_full_cache(self, levels: list[Middle], monkeypatch: pytest.MonkeyPatch) -> None:
        """After every step the middle level holds, behind what it retrieved, byte by byte what the target holds."""
        refresh, checked = Middle.refresh, []

        def checking(self: Middle, root: int, anew: bool) -> None:
            before = [layer._keys.clone() for layer in self.target.cache.slots]
            refresh(self, root, anew)
            for layer, full in zip(self.cache.slots, before, strict=True):
                since = self.length - self.built_at
                assert torch.equal(
                    layer.keys[0, :, layer.keys.shape[2] - since :], full[0, :, self.built_at : self.length]
                )
                checked.append(since)
            for layer, full in zip(self.target.cache.slots, before, strict=True):
                assert torch.equal(layer._keys[:, :, : self.length], full[:, :, : self.length])

        monkeypatch.setattr(Middle, "refresh", checking)
        run(TriForceDrafter(NgramDrafter(), budget=64, agreed=0.0), prompt(300), max_new_tokens=60)
        assert max(checked) > 30

    @pytest.mark.parametrize(
        ("arguments", "match"), [({"budget": 15}, "two chunks"), ({"chunk": 0}, "two chunks"), ({}, "hidden states")]
    )
    def test_arguments_that_cannot_be(self, arguments: dict[str, int], match: str) -> None:
        first = SimpleNamespace(name="it", topk=0, hidden=not arguments)
        with pytest.raises(ValueError, match=match):
            TriForceDrafter(first, **arguments)


def scripted(chance: enumerated.Branches, first_law: Any, middle_law: Any, depth: int, budget: Budget) -> DraftTree:
    """The drafter's own steps, with laws in place of models and a script in place of chance."""
    drafter, prefix = TriForceDrafter(Nothing()), list[int]()

    def forward(batch: Sequence[DraftTree]) -> Any:
        paths = [(*prefix, *enumerated.spelled(batch[0], node)) for node in range(len(batch[0]))]
        laws.last = batch[0]
        return SimpleNamespace(logits=torch.stack([middle_law(path) for path in paths]).log()[None])

    def keep(paths: Sequence[Sequence[int]]) -> None:
        prefix.extend(laws.last.tokens[list(paths[0])[1:]].tolist())

    def guess(contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """A chain drawn from the first level's law."""
        text, path = tuple(contexts[0].tokens[1:].tolist()), list[int]()
        prefix[:] = text
        for _ in range(budgets[0].depth if budgets[0].nodes else 0):
            path.append(chance.token(first_law((*text, *path))))
        return [DraftTree.chain(int(contexts[0].tokens[-1]), path, [1.0] * len(path), "")]

    laws = SimpleNamespace(forward=forward, keep=keep, last=None)
    drafter.first = SimpleNamespace(draft=guess, topk=0)
    level = object.__new__(Middle)
    level.model, level.choice, level.agreed, level.passes = laws, Choice(4, True), 0.9, 0
    context, text = Context([0]), Context([0])
    return drafter._written(context, text, level, budget, depth)


@pytest.fixture
def by_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whatever the drafter chooses, it chooses by the script in the list."""
    scripts: list[Any] = []

    def choose(scores: torch.Tensor, samples: bool, generator: Any, without: int | None = None) -> int:
        weights = scores.double().softmax(-1)
        if without is not None:
            weights[without] = 0
            if not weights.sum():
                return -1
        return scripts[-1].token(weights)

    monkeypatch.setattr(middle, "chosen", choose)
    monkeypatch.setattr(triforce, "chosen", choose)
    return scripts


class TestLaw:
    def test_of_the_middle_level_is_its_own(self, by_script: list[Any]) -> None:
        """G12: speculative sampling with the published resampling would give another one."""
        p1, q0 = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
        both = torch.minimum(p1, q0)
        np.testing.assert_allclose(both + (1 - both.sum()) * p1, [0.26, 0.32, 0.28, 0.14], atol=1e-6)

        def run(chance: enumerated.Branches) -> tuple[int, ...]:
            by_script.append(chance)
            tree = scripted(chance, lambda _: q0, lambda _: p1, 2, Budget(2, 2, 1))
            assert torch.allclose(tree.q[:2], p1.expand(2, -1))
            return tuple(tree.tokens[1:].tolist())

        law = np.zeros((4, 4))
        for weight, tokens in enumerated.outcomes(run):
            law[tokens] += weight
        np.testing.assert_allclose(law, np.outer(p1, p1), atol=1e-6)
        np.testing.assert_allclose(law.sum(1), [0.4, 0.3, 0.2, 0.1], atol=1e-6)

    @pytest.mark.parametrize("rule", ["recursive", "traversal", "match"])
    @pytest.mark.parametrize(("vocab", "depth", "nodes"), [(3, 2, 2), (3, 2, 4), (2, 3, 4)])
    def test_of_what_is_committed_is_the_targets(
        self, rule: str, vocab: int, depth: int, nodes: int, by_script: list[Any]
    ) -> None:
        """All that can happen at all three levels, for laws that depend on all tokens before."""
        for seed in range(2):
            target, level, first = (enumerated.random_laws(3 * seed + i, vocab) for i in range(3))
            wanted = enumerated.joint(target, vocab, depth + 1)
            got = np.zeros_like(wanted)

            def run(chance: enumerated.Branches, target=target, level=level, first=first) -> tuple[int, ...]:
                by_script.append(chance)
                tree = scripted(chance, first, level, depth, Budget(nodes, depth, 2))
                tree = enumerated.DraftTree(
                    tree.tokens, tree.parents, tree.probability, tree.source, tree.q.double(), "swor"
                )
                return enumerated.judge(getattr(rules, rule), tree, target, chance)[1]

            for weight, tokens in enumerated.outcomes(run):
                rest = wanted[tokens]
                got[tokens] += weight * (rest / rest.sum() if rest.sum() else 1 / rest.size)
            np.testing.assert_allclose(got, wanted, atol=1e-5)

    @staticmethod
    def sampled(runs: int, policy: Any) -> float:
        """How well samples of a model of five tokens fit its law: Pearson's chi-square, with a fixed seed."""
        torch.manual_seed(0)
        target, ids = sampling.model(), torch.randint(0, 5, (1, 24), generator=torch.Generator().manual_seed(1))
        drafter = TriForceDrafter(NgramDrafter(), budget=8, chunk=2)
        with specdec.speculating(target, drafter, policy, verifier=RejectionVerifier(), cpu_kernels=False):
            output = [
                target.generate(ids.expand(100, -1), do_sample=True, max_new_tokens=3, top_k=0)
                for _ in range(runs // 100)
            ]
            stats = specdec.stats(target)
        assert stats.fault_count == 0
        assert stats.accepted > 0.2 * runs
        return sampling.p_value(sampling.counts(torch.cat(output)[:, 24:]), sampling.law(target, ids, 3))

    @pytest.mark.parametrize("runs", [400, pytest.param(10000, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("policy", [FixedPolicy(2, 2, 1), FixedPolicy(5, 2, 3)], ids=["chain", "tree"])
    def test_of_a_model(self, runs: int, policy: Any) -> None:
        assert self.sampled(runs, policy) > 0.01

    def test_of_a_level_that_says_another_than_it_draws_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch, "stack", lambda laws, dim=0: torch.cat([law.unsqueeze(dim) for law in laws], dim) * 0
        )
        assert self.sampled(1000, FixedPolicy(2, 2, 1)) < 1e-6
