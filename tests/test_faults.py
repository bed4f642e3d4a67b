"""Whatever a drafter does wrong costs speed, never output: it is counted, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.core import Budget, Context, DraftTree
from specdec.guard import GuardedDrafter
from specdec.policies import FixedPolicy
from specdec.statistics import Stats
from tests import tiny
from tests.tiny import VOCAB, Both, Oracle, both, padded, prompt

POLICY = FixedPolicy(12, 5, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


class Faulty(Oracle):
    """Does what it is told in place of drafting, at every ``every``-th call."""

    name = "faulty"

    def __init__(
        self, act: Callable[[Sequence[Context], Sequence[Budget]], Any], texts: Any = (), every: int = 1
    ) -> None:
        super().__init__(texts)
        self.act, self.every = act, every

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> Any:
        sound = super().draft(contexts, budgets)
        return sound if self.calls % self.every else self.act(contexts, budgets)


def trees(make: Callable[[Context], Any]) -> Callable[..., Any]:
    """Something else for every context."""
    return lambda contexts, budgets: [make(context) for context in contexts]


def tree(context: Context, **wrong: Any) -> DraftTree:
    """A root with two children, save for what is to be wrong."""
    parts = {
        "tokens": np.array([context.tokens[-1], 5, 6]),
        "parents": np.array([-1, 0, 0]),
        "probability": np.array([1, 0.5, 0.5], np.float32),
        "source": ("", "faulty", "faulty"),
    }
    return DraftTree(**{**parts, **wrong})


def run(model: Any, drafter: Any, batch: dict[str, Any] | None = None) -> tuple[Both, list[str]]:
    """Plain and ours, checked equal, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = both(model, batch or {"input_ids": prompt()}, drafter=drafter, max_new_tokens=20)
    assert result.ours.tolist() == result.plain.tolist()
    return result, [str(each.message) for each in caught if issubclass(each.category, specdec.SpecdecWarning)]


def raises(contexts: Sequence[Context], budgets: Sequence[Budget]) -> Any:
    raise ZeroDivisionError("by none")


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "tokens in a list": ({"tokens": [5, 5, 6]}, "tokens is a list"),
    "tokens in a tensor": ({"tokens": torch.tensor([5, 5, 6])}, "tokens is a Tensor"),
    "short tokens": ({"tokens": np.array([5, 5, 6], np.int32)}, "tokens is int32"),
    "two axes": ({"parents": np.array([[-1, 0, 0]])}, "parents has shape"),
    "parents amiss": ({"parents": np.array([-1, 0])}, "3, 2 and 3 entries"),
    "double probability": ({"probability": np.array([1, 0.5, 0.5])}, "probability is float64"),
    "another root": ({"tokens": np.array([VOCAB + 1, 5, 6])}, "root's token"),
    "root with a parent": ({"parents": np.array([0, 0, 0])}, "root's parent is 0"),
    "child first": ({"parents": np.array([-1, 2, 0])}, "node 1 has parent 2"),
    "own parent": ({"parents": np.array([-1, 1, 0])}, "node 1 has parent 1"),
    "second root": ({"parents": np.array([-1, 0, -1])}, "node 2 has parent -1"),
    "token too large": ({"tokens": [VOCAB, 6]}, f"token {VOCAB}"),
    "token below zero": ({"tokens": [-1, 6]}, "token -1"),
    "token of a larger vocabulary": ({"tokens": [6, 32_000]}, "token 32000"),
    "probability above one": ({"probability": np.array([1, 1.5, 0.5], np.float32)}, "probability 1.5"),
    "probability below zero": ({"probability": np.array([1, 0.5, -0.5], np.float32)}, "probability -0.5"),
    "no number": ({"probability": np.array([1, np.nan, 0.5], np.float32)}, "probability nan"),
    "twins": ({"tokens": [6, 6]}, "nodes 1 and 2 both guess token 6"),
    "no source": ({"source": None}, "source"),
    "too few sources": ({"source": ("", "faulty")}, "source"),
    "sources that are no names": ({"source": ([], [], [])}, "source"),
    "unknown law": ({"law": "of the land"}, "law"),
    "too few rows of q": ({"q": torch.ones(1, VOCAB), "law": "iid"}, "q"),
    "q in a list": ({"q": [1, 2, 3], "law": "iid"}, "q"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_trees(model: Any, case: str) -> None:
    wrong, said = MALFORMED[case]

    def make(context: Context) -> DraftTree:
        made = dict(wrong)
        if case.startswith("token ") or case == "twins":
            made["tokens"] = np.array([context.tokens[-1], *made["tokens"]])
        return tree(context, **made)

    result, warned = run(model, Faulty(trees(make)))
    assert said in result.stats.faults[0]
    assert result.stats.drafted == 0
    # At the end, too, but neither at the prompt's step nor where a single token is left.
    assert result.stats.fault_count == result.stats.steps - 1
    assert len(warned) == 1


def test_a_tree_without_a_root(model: Any) -> None:
    empty = DraftTree(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), ())
    result, warned = run(model, Faulty(trees(lambda context: empty)))
    assert "no root" in result.stats.faults[0]
    assert len(warned) == 1


ANSWERS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raises, "raised ZeroDivisionError: by none"),
    "nothing": (lambda contexts, budgets: None, "returned NoneType"),
    "text": (lambda contexts, budgets: "tree", "returned str"),
    "too few": (lambda contexts, budgets: [], "instead of 1 trees"),
    "too many": (lambda contexts, budgets: [tree(contexts[0])] * 2, "instead of 1 trees"),
    "a generator": (lambda contexts, budgets: (tree(context) for context in contexts), "returned generator"),
    "no trees": (trees(lambda context: None), "a NoneType where a DraftTree was due"),
    "tokens alone": (trees(lambda context: [5, 6]), "a list where a DraftTree was due"),
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("every", [1, 3])
def test_wrong_answers(model: Any, case: str, every: int) -> None:
    act, said = ANSWERS[case]
    known = model.generate(prompt(), max_new_tokens=20).tolist()
    result, warned = run(model, Faulty(act, known, every))
    assert said in result.stats.faults[0]
    assert result.stats.faults[0].startswith("faulty: ")
    assert len(warned) == 1
    assert "faulty" in warned[0]
    assert (result.stats.accepted > 0) == (every > 1)  # the sound guesses between are used


def test_one_row_of_a_batch_is_wrong(model: Any) -> None:
    batch = padded(9, 4)
    known = tiny.texts(model.generate(**batch, max_new_tokens=20), batch["attention_mask"])

    class First(Oracle):
        name = "first"

        def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
            made = super().draft(contexts, budgets)
            return [
                tree(context, source=None) if context.prompt_length == 9 else each
                for context, each in zip(contexts, made, strict=True)
            ]

    result, warned = run(model, First(known), batch)
    assert result.stats.accepted > 0
    assert len(warned) == 1


class TestBeyondTheBudget:
    """The likeliest part that fits is used."""

    def wide(self, context: Context) -> DraftTree:
        n = 40
        tokens = np.array([context.tokens[-1], *range(3, 3 + n)])
        return DraftTree(tokens, np.array([-1, *[0] * n]), np.ones(n + 1, np.float32), ("", *["wide"] * n))

    def deep(self, context: Context) -> DraftTree:
        return DraftTree.chain(int(context.tokens[-1]), [7] * 300, [1.0] * 300, "deep")

    @pytest.mark.parametrize("shape", ["wide", "deep"])
    def test_it_is_cut_and_counted(self, model: Any, shape: str) -> None:
        result, warned = run(model, Faulty(trees(getattr(self, shape))))
        assert "beyond its budget" in result.stats.faults[0]
        assert len(warned) == 1
        live = result.stats.steps - 1
        assert 0 < result.stats.drafted <= live * (6 if shape == "wide" else 5)

    def test_what_is_cut_can_still_be_right(self, model: Any) -> None:
        known = Oracle(model.generate(prompt(), max_new_tokens=20).tolist())

        def make(context: Context) -> DraftTree:
            true = known.known(context.tokens).tolist() or [5]
            return DraftTree.chain(int(context.tokens[-1]), true, [1.0] * len(true), "long")

        result, _ = run(model, Faulty(trees(make)))
        assert result.stats.tokens_per_step > 3

    def test_what_is_malformed_is_not_cut_but_refused(self, model: Any) -> None:
        def make(context: Context) -> DraftTree:
            tree = self.deep(context)
            tree.probability[200] = 2.0
            return tree

        result, _ = run(model, Faulty(trees(make)))
        assert all("node 200 has probability 2.0" in fault for fault in result.stats.faults)
        assert result.stats.drafted == 0

    def test_chains_are_cut_from_trees_where_no_more_can_be_verified(self) -> None:
        stats = Stats()
        guard = GuardedDrafter(Faulty(trees(tree)), stats, VOCAB, chains=True)
        (left,) = guard.draft([Context([4])], [Budget(12, 5, 6)])
        assert left.tokens.tolist() == [4, 5]
        assert stats.fault_count == 0

    def test_nothing_was_asked_for(self, model: Any) -> None:
        drafter = Faulty(trees(tree))
        with warnings.catch_warnings(), specdec.speculating(model, drafter, FixedPolicy(0)):
            warnings.simplefilter("ignore")
            ours = model.generate(prompt(), max_new_tokens=8).tolist()
            stats = specdec.stats(model)
        assert ours == model.generate(prompt(), max_new_tokens=8).tolist()
        assert stats.drafted == 0
        assert stats.fault_count == 1  # at the end; before, nobody called it


class TestCounting:
    def test_a_warning_per_drafter_however_many_faults(self, model: Any) -> None:
        with warnings.catch_warnings(record=True) as caught, specdec.speculating(model, Faulty(raises), POLICY):
            warnings.simplefilter("always")
            for _ in range(3):
                model.generate(prompt(), max_new_tokens=50, eos_token_id=None)
            stats = specdec.stats(model)
        assert stats.fault_count == 147  # a step that has room for one token asks for nothing
        assert len(stats.faults) == 100
        assert len([each for each in caught if issubclass(each.category, specdec.SpecdecWarning)]) == 1

    def test_another_drafter_is_warned_of_too(self, model: Any) -> None:
        class Other(Faulty):
            name = "other"

        for drafter in (Faulty(raises), Other(raises)):
            _, warned = run(model, drafter)
            assert len(warned) == 1
            assert drafter.name in warned[0]

    def test_on_the_returned_object_too(self, model: Any) -> None:
        with (
            pytest.warns(specdec.SpecdecWarning, match="ZeroDivisionError"),
            specdec.speculating(model, Faulty(raises), POLICY),
        ):
            output = model.generate(prompt(), max_new_tokens=6, return_dict_in_generate=True)
        assert output.stats.fault_count == 5
        assert "ZeroDivisionError" in output.stats.faults[0]


class TestUnusualDrafters:
    def test_one_without_attributes(self, model: Any) -> None:
        class Bare:
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> tuple[DraftTree, ...]:
                return tuple(
                    tree(context, source=("", "", "")) if budget.nodes else DraftTree.root(int(context.tokens[-1]))
                    for context, budget in zip(contexts, budgets, strict=True)
                )

        result, warned = run(model, Bare())
        assert result.stats.drafted > 0
        assert not warned

    @pytest.mark.parametrize("topk", [1, VOCAB, 1000])
    def test_one_that_wants_many_candidates(self, model: Any, topk: int) -> None:
        widths = []

        class Curious(Oracle):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                widths.extend(context.verdict.candidates.shape[1] for context in contexts)
                return super().draft(contexts, budgets)

        result, warned = run(model, Curious(model.generate(prompt(), max_new_tokens=20).tolist(), topk=topk))
        assert result.stats.accepted > 0
        assert set(widths) == {min(topk, VOCAB)}
        assert not warned

    @pytest.mark.parametrize("what", ["tokens", "finished", "scratch", "all"])
    def test_one_that_changes_what_it_is_shown(self, model: Any, what: str) -> None:
        def vandalise(contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
            made = [tree(context) for context in contexts]
            for context in contexts:
                if what in ("finished", "all"):
                    context.finished = True
                if what in ("scratch", "all"):
                    context.scratch.clear()
                if what in ("tokens", "all"):
                    context.tokens[:] = 5
            return made

        run(model, Faulty(vandalise))
        run(model, Faulty(vandalise), padded(9, 4))

    def test_one_that_returns_the_same_arrays_again(self, model: Any) -> None:
        tokens = np.array([0, 5, 6])

        def reuse(contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
            tokens[0] = contexts[0].tokens[-1]
            return [tree(contexts[0], tokens=tokens)] if budgets[0].nodes else [DraftTree.root(tokens[0])]

        result, warned = run(model, Faulty(reuse))
        assert result.stats.drafted > 0
        assert not warned


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_comes_through(model: Any, kind: type[BaseException]) -> None:
    def interrupt(contexts: Sequence[Context], budgets: Sequence[Budget]) -> Any:
        raise kind

    plain = model.generate(prompt(), max_new_tokens=10).tolist()
    drafter = Faulty(interrupt, plain, every=2)
    with specdec.speculating(model, drafter, POLICY):
        with pytest.raises(kind):
            model.generate(prompt(), max_new_tokens=10)
        assert specdec.stats(model).fault_count == 0
        drafter.every = 10**9
        assert model.generate(prompt(), max_new_tokens=10).tolist() == plain


def test_errors_of_a_policy_are_the_callers_to_see(model: Any) -> None:
    class Broken(FixedPolicy):
        def budget(self, contexts: Sequence[Context]) -> list[Budget]:
            raise LookupError("no budget")

    with specdec.speculating(model, Oracle(), Broken(4)), pytest.raises(LookupError, match="no budget"):
        model.generate(prompt(), max_new_tokens=4)
