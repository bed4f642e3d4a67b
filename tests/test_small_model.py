"""A smaller model as the drafter: rows hold what was committed, trees say how they were made, output is right."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

import specdec
from specdec import trees
from specdec.attach import attach
from specdec.core import Budget, Choice, Context, DraftTree, Verdict
from specdec.costs import Costs
from specdec.drafters import MergedDrafter, NgramDrafter, SmallModelDrafter, distilled, levels, model_rows
from specdec.drafters.model_rows import Rows
from specdec.drafters.translate import TAIL, Translation
from specdec.policies import FixedPolicy, ThroughputPolicy
from specdec.trees import sampling as trees_sampling
from specdec.trees.sampling import Level
from specdec.verifiers import RejectionVerifier, rules
from tests import enumerated, sampling, simulation, tiny
from tests.tiny import VOCAB, padded, prompt, same

KINDS = ("chain", "beam", "best-first", "rsd-c", "rsd-s", "iid")
SAMPLED = ("chain", "rsd-c", "rsd-s", "iid")
BUDGET = Budget(nodes=12, depth=4, width=3)


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def rough() -> Any:
    """A model that often agrees with the target."""
    return blurred(tiny.model())


def blurred(model: Any, by: float = 0.05) -> Any:
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * weight.std() * torch.randn(weight.shape, generator=noise) if weight.ndim > 1 else 0
    return model


def small(model: Any, tree: Any = "chain", **arguments: Any) -> SmallModelDrafter:
    return SmallModelDrafter(model, tree, **{"cpu_kernels": False, **arguments})


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """How many tokens each pass of a model is fed, filling included."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


class TestTokensPerStep:
    @pytest.mark.parametrize("tree", ["chain", "rsd-c"])
    def test_of_the_target_itself_when_greedy(self, target: Any, tree: str) -> None:
        drafter = small(tiny.model(), tree, branching=(2, 1, 1, 1))
        with specdec.speculating(target, drafter, FixedPolicy(12, 4, 4), cpu_kernels=False):
            target.generate(prompt(), max_new_tokens=31, min_new_tokens=31, do_sample=False)
            assert specdec.stats(target).tokens_per_step == pytest.approx(31 / 7)  # the prompt's own, and 6 of 5

    @pytest.mark.parametrize("more", [{}, {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3}])
    def test_of_the_target_itself_when_sampling(self, target: Any, more: dict[str, Any]) -> None:
        """Only if its law is the target's, processors and warpers on each path too, is every guess accepted."""
        with specdec.speculating(target, small(tiny.model()), FixedPolicy(4, 4, 4), verifier="rejection"):
            torch.manual_seed(0)
            target.generate(
                prompt(rows=2), max_new_tokens=31, min_new_tokens=31, do_sample=True, **{"top_k": 0, **more}
            )
            assert specdec.stats(target).tokens_per_step == pytest.approx(31 / 7)
            assert set(specdec.stats(target).by_rule) == {"match", "block"}

    @pytest.mark.parametrize("sample", [False, True])
    def test_of_one_that_says_what_the_target_never_says(self, target: Any, sample: bool) -> None:
        model, late = tiny.model(), torch.arange(VOCAB) >= 50
        model.lm_head.register_forward_hook(lambda *call: call[-1].masked_fill(late, -1e4))
        with specdec.speculating(
            target, small(model, temperature=float(sample)), FixedPolicy(4, 4, 4), verifier="rejection"
        ):
            target.generate(
                prompt(), max_new_tokens=20, min_new_tokens=20, do_sample=sample, suppress_tokens=list(range(50))
            )
            stats = specdec.stats(target)
            assert stats.tokens_per_step == 1
            assert stats.drafted >= 4 * 15


class TestOutput:
    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("tree", KINDS)
    def test_is_plain_generates(self, target: Any, rough: Any, tree: str, sample: bool) -> None:
        """With the same seed too, as nothing of the drafter's is drawn from torch's own generator."""
        drafter = small(rough, tree)
        for batch in ({"input_ids": prompt()}, padded(9, 4, 12, 7)):
            result = same(target, batch, drafter=drafter, max_new_tokens=30, do_sample=sample, eos_token_id=[5, 9, 30])
            assert result.stats.accepted > 5

    @pytest.mark.parametrize("tree", ["beam", "best-first"])
    def test_with_rejection_too_where_trees_are_not_sampled(self, target: Any, rough: Any, tree: str) -> None:
        torch.manual_seed(3)
        plain = target.generate(prompt(), max_new_tokens=30, do_sample=True)
        with specdec.speculating(target, small(rough, tree), FixedPolicy(12, 4, 4), verifier="rejection"):
            torch.manual_seed(3)
            assert target.generate(prompt(), max_new_tokens=30, do_sample=True).tolist() == plain.tolist()
            assert specdec.stats(target).accepted > 5

    def test_when_the_model_fails_now_and_then(self, target: Any) -> None:
        model = tiny.model()
        drafter, calls = small(model, "best-first"), iter(range(1000))

        def fail(*_: Any) -> None:
            if next(calls) % 7 == 5:
                raise ZeroDivisionError("by none")

        model.model.layers[1].register_forward_pre_hook(fail)  # when the first layer's rows are written
        for batch in ({"input_ids": prompt()}, padded(9, 4, 7)):
            with pytest.warns(specdec.SpecdecWarning, match="by none"):
                result = tiny.both(target, batch, drafter=drafter, max_new_tokens=40)
            assert result.ours.tolist() == result.plain.tolist()
            assert result.stats.fault_count >= 2
            assert result.stats.accepted > 10

    def test_where_the_models_positions_end(self, target: Any) -> None:
        drafter, more = small(tiny.model(max_position_embeddings=20)), {"max_new_tokens": 30, "min_new_tokens": 30}
        result = same(target, {"input_ids": prompt()}, drafter=drafter, **more)
        assert result.stats.accepted > 5
        assert set(result.stats.sources[0][12:]) == {""}

    def test_where_the_model_does_not_know_a_token(self, target: Any) -> None:
        drafter = small(tiny.model(vocab_size=60))
        result = same(target, {"input_ids": prompt() % 60}, drafter=drafter, max_new_tokens=30, min_new_tokens=30)
        text = result.plain[0].tolist()
        first = next(i for i, token in enumerate(text) if token >= 60) - 9
        assert result.stats.drafted == 0 if first == 0 else set(result.stats.sources[0][first + 1 :]) == {""}

    def test_merged_with_others(self, target: Any, rough: Any) -> None:
        drafter = MergedDrafter([NgramDrafter(), small(rough, "rsd-c")])
        result = same(target, {"input_ids": prompt()}, drafter=drafter, max_new_tokens=40)
        assert result.stats.by_drafter["small"]["accepted"] > 0


class TestLaw:
    """Pearson's chi-square of what is sampled; seeds are fixed, so it never flickers."""

    @staticmethod
    def sampled(drafter: Any, runs: int, policy: Any, **more: Any) -> float:
        torch.manual_seed(0)
        target, first = sampling.model(), torch.tensor([[1, 2, 3]])
        with specdec.speculating(target, drafter, policy, verifier=RejectionVerifier(), cpu_kernels=False):
            output = [
                target.generate(first.expand(50, -1), do_sample=True, max_new_tokens=5, **{"top_k": 0, **more})
                for _ in range(runs // 50)
            ]
            stats = specdec.stats(target)
        assert stats.fault_count == 0
        assert stats.accepted > 0.1 * runs
        warpers = [sampling.tiny.transformers.TemperatureLogitsWarper(more["temperature"])] if more else []
        seen = sampling.counts(torch.cat(output)[:, 3:6])  # behind them, trees may be deep
        return sampling.p_value(seen, sampling.law(target, first, 3, warpers))

    @pytest.mark.parametrize("runs", [100, pytest.param(20000, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("tree", SAMPLED)
    def test_is_the_targets(self, tree: str, runs: int) -> None:
        drafter = small(blurred(sampling.model(), 0.3), tree, branching=(2, 2), width=3)
        assert self.sampled(drafter, runs, FixedPolicy(8, 2, 4)) > 0.01

    def test_is_the_targets_where_warped_and_cut_short(self) -> None:
        drafter = small(blurred(sampling.model(), 0.3), "rsd-c", branching=(2, 2))
        assert self.sampled(drafter, 100, FixedPolicy(8, 2, 4, 0.4), temperature=0.6) > 0.01

    def test_where_the_policy_chooses_sizes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = ThroughputPolicy(Costs({1: 1.0, 32: 1.1}), clock=lambda: 0.0)
        monkeypatch.setattr(policy.costs, "learn", lambda *_: None)  # whatever passes take on this machine
        assert self.sampled(small(blurred(sampling.model(), 0.3), "rsd-c"), 100, policy) > 0.01

    def test_of_a_drafter_that_says_another_than_it_draws_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = levels.sampled

        def flat(*arguments: Any) -> Any:
            draft = yield from honest(*arguments)
            return draft._replace(q=torch.full_like(draft.q, 0.2))

        monkeypatch.setattr(levels, "sampled", flat)
        assert self.sampled(small(blurred(sampling.model(), 0.3)), 200, FixedPolicy(8, 2, 4)) < 1e-6


def logits(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0, -1]


MODELS = {
    "full": lambda: tiny.model(),
    "window": lambda: tiny.model("Mistral", sliding_window=5),
    "mixed": lambda: tiny.model(
        "Qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "learnt positions": lambda: tiny.gpt2(),
    "eager": lambda: tiny.model(attn_implementation="eager"),
}


class TestRows:
    @pytest.mark.parametrize("kind", MODELS)
    def test_say_what_plain_passes_say(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trees of several texts, each of its own length, level by level, and again after a part of them is kept."""
        monkeypatch.setattr(model_rows, "PIECE", 4)
        model = MODELS[kind]()
        rows, draw = Rows(model, attach(model, timed=False).form), np.random.default_rng(0)
        texts = [draw.integers(3, VOCAB, n) for n in (9, 4, 14)]
        for i, text in enumerate(texts):
            other = rows if i == 0 else Rows(model, rows.form)
            other.read([text[:-1]])
            if i:
                rows.join(other)
        for _ in range(3):
            after = rows.read(texts)
            for text, row in zip(texts, after, strict=True):
                torch.testing.assert_close(row, logits(model, text), atol=1e-4, rtol=1e-4)
            texts = [
                np.append(text, path) for text, path in zip(texts, self.grown(model, rows, texts, draw), strict=True)
            ]

    def grown(self, model: Any, rows: Rows, texts: list[np.ndarray], draw: Any) -> list[list[int]]:
        """Grow trees at random, checked; returns a path of each and a token after it."""
        nodes = [([int(text[-1])], [-1]) for text in texts]
        for depth in (1, 2, 3):
            asked: list[Level | None] = []
            for row, (tokens, parents) in enumerate(nodes):
                start, last = (
                    len(tokens),
                    [i for i in range(len(tokens)) if trees.depths(np.array(parents))[i] == depth - 1],
                )
                for _ in range(int(draw.integers(1, 4)) if row or depth < 3 else 0):
                    parents.append(int(draw.choice(last)))
                    tokens.append(int(draw.integers(3, VOCAB)))
                asked.append(Level(np.array(tokens), np.array(parents), start) if start < len(tokens) else None)
            for level, text, after in zip(asked, texts, rows.grow(asked), strict=True):
                for path, row in zip(levels.newest(level) if level else [], after, strict=True):
                    torch.testing.assert_close(row, logits(model, [*text, *path]), atol=1e-4, rtol=1e-4)
        return [[*levels.newest(Level(np.array(t), np.array(p), len(t) - 1))[0], 7] for t, p in nodes]

    @pytest.mark.parametrize("tree", KINDS)
    def test_hold_what_was_committed_and_no_token_is_fed_twice(self, rough: Any, target: Any, tree: str) -> None:
        drafter, text = small(rough, tree), target.generate(prompt(), max_new_tokens=40, do_sample=False)[0].numpy()
        context, rejected = Context(text[:9]), 0
        context.choice = Choice(VOCAB, sample=tree in SAMPLED)
        with fed(rough) as seen:
            while len(coming := text[len(context.tokens) :]):
                [made] = drafter.draft([context], [BUDGET])
                row = drafter._keeper.text(context)
                assert row is not None
                assert row.tokens.tolist() == context.tokens.tolist()
                assert sum(seen) == len(row.tokens) + rejected + len(row.tree.tokens) - 1
                path = trees.follow(made.tokens, made.parents, coming[:-1])
                kept = trees.follow(row.tree.tokens, row.tree.parents, coming[: len(path) - 1])
                context.extend(Verdict(made, path, coming[: len(path)]))
                rejected += len(row.tree.tokens) - len(kept)
        assert len(text) - 5 < sum(seen) - rejected <= len(text)

    def test_come_and_go(self, rough: Any) -> None:
        """A batch whose texts change from call to call drafts for each what it would for it alone."""
        drafter, alone = small(rough, "best-first"), small(rough, "best-first")
        draw = np.random.default_rng(1)
        contexts = {
            name: Context(draw.integers(3, VOCAB, n)) for name, n in zip("abcde", (5, 12, 1, 8, 3), strict=True)
        }
        for names in ("a", "abc", "ac", "bc", "edca", "d", "ad", "e"):
            live = [contexts[name] for name in names]
            for context, tree in zip(live, drafter.draft(live, [BUDGET] * len(live)), strict=True):
                [wanted] = alone.draft([Context(context.tokens)], [BUDGET])
                assert tree.tokens.tolist() == wanted.tokens.tolist()
                assert tree.parents.tolist() == wanted.parents.tolist()
                path = np.arange(2) if tree.parents[1] == 0 else np.arange(1)
                context.extend(Verdict(tree, path, np.append(tree.tokens[path[1:]], draw.integers(3, VOCAB))))

    def test_of_an_ended_text_serve_one_that_begins_alike(self, target: Any, rough: Any) -> None:
        drafter = small(rough)

        def run(ids: torch.Tensor, namespace: str) -> tuple[torch.Tensor, int]:
            """What is written, and how many tokens the drafter was fed for it."""
            with specdec.speculating(target, drafter, FixedPolicy(2, 2, 2), namespace=namespace), fed(rough) as seen:
                return target.generate(ids, max_new_tokens=3, do_sample=False), sum(seen)

        text, first = run(prompt(60), "one")
        longer = torch.cat([text, prompt(5)], 1)
        assert first > 60
        assert run(longer, "one")[1] < 20
        assert run(longer, "two")[1] > 68
        drafter.reset()
        assert run(longer, "two")[1] > 68

    def test_a_call_that_asks_for_nothing_runs_nothing(self, rough: Any) -> None:
        drafter, context = small(rough), Context([5, 6, 7])
        with fed(rough) as seen:
            [tree] = drafter.draft([context], [Budget(0, 0, 0)])
        assert (len(tree), seen) == (1, [])

    def test_one_pass_for_each_level_of_a_batch(self, rough: Any) -> None:
        drafter, contexts = small(rough, "beam", width=3), [Context([5, 6, 7]), Context([8, 9])]
        drafter.draft(contexts, [BUDGET] * 2)
        for context in contexts:
            tree = drafter.draft([Context(context.tokens)], [BUDGET])[0]
            context.extend(Verdict(tree, np.arange(1), np.array([3])))
        with fed(rough) as seen:
            drafter.draft(contexts, [BUDGET] * 2)
        assert seen == [2, 6, 6, 6]

    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("tree", KINDS)
    def test_texts_share_passes_whatever_the_tree(self, rough: Any, tree: str, sample: bool) -> None:
        drafter, contexts = small(rough, tree, branching=(2, 1, 1)), [Context([5, 6, 7]), Context([8, 9])]
        for context in contexts:
            context.choice = Choice(VOCAB, sample)
        drafter.draft(contexts, [BUDGET] * 2)
        for context in contexts:
            context.extend(Verdict(DraftTree.root(int(context.tokens[-1])), np.arange(1), np.array([3])))
        with fed(rough) as seen:
            drafted = drafter.draft(contexts, [BUDGET] * 2)
        assert all(len(made) > 2 for made in drafted)
        assert len(seen) <= BUDGET.depth


class TestTrees:
    @pytest.mark.parametrize("tree", KINDS)
    def test_are_within_their_budgets(self, rough: Any, tree: str) -> None:
        for sample in (False, True):
            for budget in (Budget(12, 4, 3), Budget(1, 5, 5), Budget(5, 1, 2), Budget(7, 9, 1, 0.3), Budget(3, 2, 2)):
                drafter, context = small(rough, tree), Context([5, 6, 7])
                context.choice = Choice(VOCAB, sample)
                [made] = drafter.draft([context], [budget])
                limits = (budget.nodes, budget.depth, budget.width)
                assert trees.fault(made.tokens, made.parents, made.probability, 7, VOCAB, *limits) is None
                assert made.law == ("swor" if sample and tree in SAMPLED and len(made) > 1 else None)
                assert len(made) > 1
                assert made.q is None or made.q.shape == (len(made), VOCAB)

    def test_best_first_has_the_likeliest_paths(self) -> None:
        """On a table of which token follows which, against all paths there are."""
        table = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)) * 2
        growth = levels.best_first(0, 9, 6, 3)
        level = levels.advance(growth)
        while isinstance(level, Level):
            level = levels.advance(growth, table[level.tokens[level.start :]])
        q, paths = table.softmax(-1), {(): 1.0}
        for _ in range(3):
            paths |= {
                (*path, x): p * float(q[path[-1] if path else 0, x]) for path, p in paths.items() for x in range(6)
            }
        best = sorted(paths.values(), reverse=True)[:10]
        assert level.probability.tolist() == pytest.approx(best, rel=1e-5)
        for node in range(1, 10):
            spelled = tuple(levels.newest(Level(level.tokens[: node + 1], level.parents[: node + 1], node))[0].tolist())
            assert level.probability[node] == pytest.approx(paths[spelled], rel=1e-5)

    def test_what_is_expected_of_a_sampled_node_does_not_hang_on_its_token(self, rough: Any) -> None:
        """Else a policy that keeps the likeliest would bend the law."""
        drawn = {}
        for seed in range(30):
            context = Context([5, 6, 7])
            context.choice = Choice(VOCAB, True)
            [tree] = small(rough, "rsd-c", branching=(2, 1), seed=seed).draft([context], [BUDGET])
            assert tree.probability[1] > tree.probability[2] > 0
            drawn[tuple(tree.tokens[1:3].tolist())] = tree.probability[1:3].tolist()
        assert len(drawn) > 3
        assert len(set(map(tuple, drawn.values()))) == 1

    def test_of_another_size_of_vocabulary(self, target: Any) -> None:
        """Models of one tokenizer are padded to different sizes."""
        for size in (VOCAB - 7, VOCAB + 31):
            drafter = small(tiny.model(vocab_size=size), "rsd-c")
            with specdec.speculating(target, drafter, FixedPolicy(8, 3, 3), verifier="rejection"):
                torch.manual_seed(0)
                target.generate(prompt() % 80, max_new_tokens=30, min_new_tokens=30, do_sample=True)
                assert specdec.stats(target).fault_count == 0
                assert specdec.stats(target).by_rule["traversal"] > 2

    def test_of_one_seed_are_the_same_and_leave_torchs_generator_alone(self, rough: Any) -> None:
        context, state = Context([5, 6, 7]), torch.get_rng_state()
        made = [
            small(rough, "rsd-s", temperature=1.0, seed=n).draft([context], [BUDGET])[0].tokens.tolist()
            for n in (1, 1, 2)
        ]
        assert made[0] == made[1] != made[2]
        assert torch.equal(torch.get_rng_state(), state)


KEPT = np.array([3, 4, 5, 8, 20, 21, 30, 44, 50, 61, 77, 90, 96])


class Wide(torch.nn.Module):
    """What a trimmed head says, of all tokens."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.head.widened(self.head.few(hidden))
        return wide


@pytest.fixture(scope="module")
def pair(target: Any) -> tuple[Any, Any]:
    """A draft with a head of some tokens, and one that says the same of all."""
    trimmed = distilled.distilled(target, [0, 1], KEPT)
    wide = copy.deepcopy(trimmed)
    wide.set_output_embeddings(Wide(wide.get_output_embeddings()))
    return trimmed, wide


class TestTrimmed:
    """A head of some tokens: trees are grown from those alone, and say the same as of all."""

    @pytest.mark.parametrize("tree", ["chain", "beam", "best-first", "rsd-c"])
    def test_likeliest_trees_are_the_same(self, pair: Any, tree: str) -> None:
        made = [small(model, tree).draft([Context([5, 6, 7])], [BUDGET])[0] for model in pair]
        assert made[0].tokens.tolist() == made[1].tokens.tolist()
        assert made[0].parents.tolist() == made[1].parents.tolist()
        np.testing.assert_allclose(made[0].probability, made[1].probability, rtol=1e-4)

    @pytest.mark.parametrize("warped", ["not", "by size", "by token"])
    @pytest.mark.parametrize("tree", SAMPLED)
    def test_sampled_trees_say_the_law_they_are_drawn_from(self, pair: Any, tree: str, warped: str) -> None:
        trimmed, wide = pair
        warpers = {
            "not": None,
            "by size": LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
            "by token": LogitsProcessorList([SuppressTokensLogitsProcessor([8], "cpu")]),
        }[warped]
        context = Context([5, 6, 7])
        context.choice = Choice(VOCAB, True, warpers)
        [made] = small(trimmed, tree).draft([context], [BUDGET])
        assert made.q is not None
        assert set(made.tokens[1:].tolist()) <= set(KEPT.tolist())
        for node in set(made.parents[1:].tolist()):
            level = Level(made.tokens[: node + 1], made.parents[: node + 1], node)
            text = [5, 6, 7, *levels.newest(level)[0].tolist()]
            plain = logits(wide, text)[None]
            law = (plain if warpers is None else warpers(torch.tensor([text]), plain)).softmax(-1)[0]
            torch.testing.assert_close(made.q[node], law, atol=1e-5, rtol=1e-4)

    def test_a_drawn_place_is_called_by_its_token(self) -> None:
        sure = torch.tensor([[0.0, 99.0, 0.0]])
        for growth in (
            levels.sampled(trees_sampling.without_replacement(7, (1, 1))),
            levels.judged(7, 2, 0.0, torch.Generator()),
            levels.judged(7, 2, 0.0, None),
            levels.likeliest(7, (1, 1), 1),
        ):
            step = levels.advance(growth)
            while isinstance(step, Level):
                assert step.tokens.tolist() == [7, 44, 44][: len(step.tokens)]
                step = levels.advance(growth, sure, 1.0, np.array([30, 44, 50]))
            assert step.tokens.tolist() == [7, 44, 44]

    def test_output_is_the_targets(self, target: Any, pair: Any) -> None:
        for more in ({}, {"do_sample": True}):
            result = same(target, {"input_ids": prompt()}, drafter=small(pair[0], "beam"), max_new_tokens=30, **more)
            assert result.stats.accepted > 0


class TestThrift:
    def test_a_level_pays_where_tokens_come_faster_with_it(self) -> None:
        draw = np.random.default_rng(0)
        for _ in range(200):
            n, cost = int(draw.integers(2, 6)), float(draw.uniform(0.01, 0.5))
            sums = [1.0, *np.cumprod(draw.uniform(0.1, 1.3, n - 1)).tolist()]
            more = sums[-1] * sums[-1] / sums[-2]
            before, after = sum(sums) / (1 + cost * (n - 1)), (sum(sums) + more) / (1 + cost * n)
            assert levels.pays(sums, cost) == (after > before)
            assert levels.pays(sums, 0.0)
        assert not levels.pays([1.0, 0.0], 0.1)

    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("tree", KINDS)
    def test_levels_are_drafted_while_they_pay(self, rough: Any, tree: str, sample: bool) -> None:
        """By the clock: next to nothing, and as much as a pass of the target; not before both are known."""
        clock = simulation.Clock()

        def levels_of(seconds: float, thrifty: bool = True) -> list[int]:
            """How many passes each of three drafts takes."""
            drafter = small(rough, tree, thrifty=thrifty, clock=clock, branching=(2, 1, 1, 1))
            context, passes = Context([5, 6, 7]), []
            context.choice = Choice(VOCAB, sample)
            hook = rough.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + seconds))
            try:
                for _ in range(3):
                    with fed(rough) as seen:
                        [made] = drafter.draft([context], [Budget(12, 4, 3)])
                    passes.append(len(seen))
                    context.extend(Verdict(made, np.arange(1), np.array([9]), seconds=1.0))
            finally:
                hook.remove()
            return passes

        whole = levels_of(1.0, thrifty=False)
        assert levels_of(1e-6) == whole
        assert levels_of(1.0) == [whole[0], 1, 1]

    @pytest.mark.parametrize("tree", KINDS)
    def test_output_is_plain_generates_whatever_the_clock_says(self, target: Any, rough: Any, tree: str) -> None:
        times = itertools.accumulate(itertools.cycle([0.0, 1e-9, 1e-4, 3.0]))
        drafter = small(rough, tree, thrifty=True, clock=lambda: next(times))
        for sample in (False, True):
            result = same(target, {"input_ids": prompt()}, drafter=drafter, max_new_tokens=30, do_sample=sample)
            assert result.stats.accepted > 0

    @pytest.mark.parametrize("tree", SAMPLED)
    def test_law_is_the_targets_whatever_the_clock_says(self, tree: str) -> None:
        times = itertools.accumulate(itertools.cycle([0.0, 1e-9, 1e-4, 3.0]))
        drafter = small(
            blurred(sampling.model(), 0.3), tree, branching=(2, 2), width=3, thrifty=True, clock=lambda: next(times)
        )
        assert TestLaw.sampled(drafter, 100, FixedPolicy(8, 2, 4)) > 0.01

    def test_a_name_beside_the_policy_that_measures_is_thrifty(self, target: Any, tmp_path: Any) -> None:
        target.save_pretrained(tmp_path)
        for policy, thrifty in (("auto", True), (FixedPolicy(4, 4, 4), False)):
            made = specdec.Speculate(f"small:{tmp_path}", policy).drafter
            assert isinstance(made, SmallModelDrafter)
            assert made.thrifty == thrifty

    def test_a_pass_straight_through_quick_layers_says_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drafter, seen, straight = (
            small(tiny.model(head_dim=16), "best-first", cpu_kernels=True),
            list[bool](),
            Rows._straight,
        )

        def spied(*arguments: Any) -> Any:
            said = straight(*arguments)
            seen.append(said is not None)
            return said

        monkeypatch.setattr(Rows, "_straight", spied)
        [made] = drafter.draft([Context([5, 6, 7])], [BUDGET])
        assert len(seen) > 1
        assert all(seen[1:])  # the first pass fills an empty cache
        monkeypatch.setattr(model_rows, "SHORT", 0)
        drafter.reset()
        [wanted] = drafter.draft([Context([5, 6, 7])], [BUDGET])
        assert made.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(made.probability, wanted.probability, rtol=1e-4)

    @pytest.mark.parametrize("tree", ["chain", "beam", "best-first"])
    def test_nothing_is_fed_that_is_less_likely_than_the_least(self, rough: Any, tree: str) -> None:
        """So a draft that is unsure costs one pass more than there are levels worth verifying."""
        for least in (0.05, 0.2, 0.5, 0.99):
            drafter = small(rough, tree)
            with fed(rough) as seen:
                [made] = drafter.draft([Context([5, 6, 7])], [Budget(24, 8, 3, least)])
            assert made.probability.min() >= least
            assert len(seen) <= 1 + trees.depths(made.parents).max()
            assert len(seen) <= len(made)

    @pytest.mark.parametrize("hindsight", [False, True])
    def test_law_of_sampled_trees_is_the_targets(self, monkeypatch: pytest.MonkeyPatch, hindsight: bool) -> None:
        """By enumeration of all that may be drawn; but not if a draft ended before a token for what that is."""
        vocab, depth, forced = 3, 3, torch.ones(1, 3)
        target, law = enumerated.random_laws(0, vocab), enumerated.random_laws(1, vocab)
        wanted, made = enumerated.joint(target, vocab, depth + 1), list[tuple[float, DraftTree]]()
        monkeypatch.setattr(trees_sampling, "_noise", lambda *_: forced)
        for path in itertools.product(range(vocab), repeat=depth):
            growth = levels.sampled(trees_sampling.without_replacement(0, (1,) * depth), 0.0, 0.45)
            step = levels.advance(growth)
            while isinstance(step, Level):
                forced = torch.where(torch.arange(vocab) == path[step.start], 1e-30, 1.0)[None]
                step = levels.advance(growth, law(path[: step.start]).log()[None])
            n = next((node for node in range(1, len(step.tokens)) if hindsight and step.tokens[node] == 1), None)
            parts = (step.tokens[:n], step.parents[:n], step.probability[:n], ("",) * len(step.tokens[:n]))
            q = torch.stack([law(path[:length]) for length in range(len(parts[0]))])
            weight = math.prod(float(law(path[:i])[token]) for i, token in enumerate(path))
            made.append((weight, DraftTree(*parts, q, "swor")))
        assert len({len(tree) for _, tree in made}) > 1
        for rule in (rules.recursive, rules.traversal):
            got, _ = enumerated.output(rule, made, target, wanted)
            assert (np.abs(got - wanted).max() < 1e-12) != hindsight


def letters(model: Any, order: torch.Tensor) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model that says the same in another tokenizer, whose ids are in another order."""
    spelled = tiny.tokenizer()
    backend = copy.deepcopy(spelled.backend_tokenizer)
    from tokenizers.models import WordLevel

    ids = {spelled.convert_ids_to_tokens(i): int(n) for i, n in enumerate(order)}
    backend.model = WordLevel(ids, unk_token="<pad>")
    other = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight[order] = weight.clone()
    return model, other


class TestOtherTokenizers:
    ORDER = torch.cat([torch.arange(3), 3 + torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(0))])

    def test_a_model_that_says_the_same_in_other_tokens(self, target: Any) -> None:
        model, other = letters(tiny.model(), self.ORDER)
        drafter = small(model, tokenizer=other, target_tokenizer=tiny.tokenizer())
        more = {"suppress_tokens": [0, 1, 2], "max_new_tokens": 90}
        for batch in ({"input_ids": prompt()}, padded(9, 4, 7)):
            result = same(target, batch, drafter=drafter, **more)
            assert result.stats.tokens_per_step > 4
        plain = small(model)
        assert same(target, {"input_ids": prompt()}, drafter=plain, **more).stats.tokens_per_step < 2

    def test_texts_come_through_piece_by_piece(self) -> None:
        target = tiny.tokenizer()
        _, other = letters(tiny.model(), self.ORDER)
        translation, text = Translation(other, target), "what is said once is said again, " * 20
        ids = np.array(target.encode(text))
        context, at = Context(ids[:5]), 5
        while at < len(ids):
            assert translation.inward(context).tolist() == other.encode(text[:at])
            assert at - context.scratch[translation].done <= 2 * TAIL
            context.extend(Verdict(specdec.DraftTree.root(0), np.arange(7), ids[at : at + 7]))
            at += 7

    def test_a_guess_that_does_not_survive_is_dropped(self) -> None:
        target = tiny.tokenizer()
        _, other = letters(tiny.model(), self.ORDER)
        translation, context = Translation(other, target), Context(target.encode("so far"))
        own = translation.inward(context).tolist()
        assert translation.outward(context, own, other.encode(", good")) == target.encode(", good")
        vocab = {token: id for token, id in target.get_vocab().items() if token != "o"}
        from tokenizers.models import WordLevel

        target.backend_tokenizer.model = WordLevel(vocab, unk_token="<pad>")
        assert Translation(other, target).outward(context, own, other.encode(", good")) == []

    def test_specials_between_words_are_passed_over(self, target: Any) -> None:
        model, other = letters(tiny.model(), self.ORDER)
        ids = torch.cat([torch.tensor([[1]]), prompt(4), torch.tensor([[2, 1]]), prompt(3)], 1)
        drafter = small(model, tokenizer=other, target_tokenizer=tiny.tokenizer())
        same(target, {"input_ids": ids}, drafter=drafter, max_new_tokens=30)
        same(target, {"input_ids": ids[:, :1]}, drafter=drafter, max_new_tokens=30)  # a text that says nothing


class TestPolicy:
    def test_a_drafter_that_takes_longer_than_it_saves_is_not_asked(self, target: Any) -> None:
        answer = target.generate(prompt(), max_new_tokens=300, min_new_tokens=300, do_sample=False)[0].tolist()
        model, clock = tiny.model(), simulation.Clock()
        pass_times = simulation.table(simulation.KERNELS)

        def played(seconds: float) -> simulation.Played:
            def wait(*_: Any) -> None:
                clock.now += seconds

            hook = model.register_forward_pre_hook(wait)
            policy = ThroughputPolicy(Costs(simulation.KERNELS), clock=clock)
            try:
                return simulation.play([(answer[:9], answer[9:])], small(model), policy, clock, pass_times)
            finally:
                hook.remove()

        quick, slow = played(0.001), played(0.2)
        assert quick.speed() > 2.5
        later = simulation.Played(slow.plain, slow.seconds[5:], slow.tokens[5:])
        assert later.speed() > 0.97  # what it takes shows when it has been asked
        assert np.mean(np.array(slow.fed) > 1) < 0.1


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"tree": "oak"}, "tree='oak': give one of chain"),
            ({"temperature": -1.0}, "temperature=-1.0"),
            ({"tokenizer": 1}, "both tokenizer and target_tokenizer"),
            ({"tree": "beam", "tokenizer": 1, "target_tokenizer": 1}, "drafts chains"),
            ({"branching": (2, 0)}, "from 1 on"),
        ],
    )
    def test_arguments(self, rough: Any, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            SmallModelDrafter(rough, **arguments)

    def test_a_model_that_takes_no_trees(self) -> None:
        with pytest.raises(ValueError, match="MambaForCausalLM takes no trees"):
            small(tiny.model("Mamba"))

    def test_names(self, target: Any, tmp_path: Any) -> None:
        target.save_pretrained(tmp_path)
        with specdec.speculating(target, f"small:{tmp_path}", FixedPolicy(4, 4, 4), cpu_kernels=False):
            target.generate(prompt(), max_new_tokens=11, do_sample=False)
            assert specdec.stats(target).tokens_per_step == pytest.approx(11 / 3)
