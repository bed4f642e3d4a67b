"""What is counted adds up, over generations and rows, and can be reset, read and stored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import specdec
from specdec.bench.counts import Counts
from specdec.core import DraftTree, Verdict
from specdec.policies import FixedPolicy
from specdec.statistics import SECONDS, SpecdecWarning, Stats
from tests import tiny
from tests.tiny import Oracle, both, padded, prompt, texts

POLICY = FixedPolicy(12, 5, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@contextmanager
def recording() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning of ours, however often it is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SpecdecWarning)
        yield caught


def verdict(parents: list[int], path: list[int], source: list[str] | None = None) -> Verdict:
    """One step: a tree, and which of its nodes were accepted."""
    n = len(parents)
    names = ("", *(source or ["a"] * (n - 1)))
    tree = DraftTree(np.arange(n), np.array(parents), np.ones(n, np.float32), names)
    return Verdict(tree, np.array(path), np.arange(1, len(path) + 1))


def first() -> Verdict:
    """The prompt's own pass over four tokens."""
    return Verdict(DraftTree.chain(0, [1, 2, 3], [1.0] * 3, ""), np.arange(4), np.array([4]), prompt=True)


FORK = [-1, 0, 0, 1, 1, 3]  # three deep


class TestCounting:
    def test_steps_tokens_and_guesses(self) -> None:
        stats = Stats()
        for each in (first(), verdict(FORK, [0, 1, 4]), verdict([-1], [0]), verdict([-1, 0], [0])):
            stats.observe(each)
        assert (stats.steps, stats.tokens) == (4, 6)
        assert (stats.drafted, stats.accepted) == (6, 2)
        assert stats.tokens_per_step == 1.5

    def test_by_depth(self) -> None:
        stats = Stats()
        for each in (
            first(),
            verdict(FORK, [0, 1, 4]),
            verdict(FORK, [0, 1, 3, 5]),
            verdict([-1, 0], [0]),
            verdict([-1], [0]),
        ):
            stats.observe(each)
        assert stats.acceptance_by_depth == [2 / 3, 2 / 2, 1 / 2]

    def test_by_drafter(self) -> None:
        stats = Stats()
        stats.observe(verdict(FORK, [0, 1, 3], ["a", "b", "b", "a", "b"]))
        stats.observe(verdict([-1, 0], [0, 1], ["c"]))
        assert stats.by_drafter == {
            "a": {"drafted": 2, "accepted": 1},
            "b": {"drafted": 3, "accepted": 1},
            "c": {"drafted": 1, "accepted": 1},
        }

    def test_nothing_yet(self) -> None:
        stats = Stats()
        assert stats.tokens_per_step == 0
        assert stats.acceptance_by_depth == []
        assert stats.level is None
        assert stats.lossless

    def test_time(self) -> None:
        parent = Stats()
        stats = Stats(parent)
        with pytest.raises(KeyError), stats.clock("walk"):
            raise KeyError
        stats.spend("draft", 2.0)
        stats.spend("draft", 1.0)
        assert stats.seconds["draft"] == parent.seconds["draft"] == 3.0
        assert 0 < stats.seconds["walk"] == parent.seconds["walk"] < 1
        assert set(stats.seconds) == set(SECONDS)


class TestParent:
    def test_it_counts_everything_too(self) -> None:
        parent = Stats()
        for _ in range(2):
            stats = Stats(parent)
            for each in (first(), verdict(FORK, [0, 1, 4])):
                stats.observe(each)
        assert (stats.steps, stats.tokens, stats.accepted) == (2, 4, 2)
        assert (parent.steps, parent.tokens, parent.accepted) == (4, 8, 4)
        assert parent.acceptance_by_depth == stats.acceptance_by_depth
        assert parent.by_drafter == {"a": {"drafted": 10, "accepted": 4}}

    def test_one_that_counts_more_does_so_for_its_children(self) -> None:
        parent = Counts()
        for each in (first(), verdict(FORK, [0, 1, 4]), verdict([-1], [0])):
            Stats(parent).observe(each)
        assert parent.depths == {"3": 1, "0": 1}
        assert parent.accepted_lengths == {"2": 1, "0": 1}

    def test_it_alone_warns(self) -> None:
        parent = Stats()
        with recording() as caught:
            for _ in range(3):
                stats = Stats(parent)
                stats.fault("ngram", "raised IndexError: x")
                stats.reason("plain generate: because")
        assert [str(each.message) for each in caught] == [
            "specdec: drafter ngram: raised IndexError: x; going on without this guess",
            "specdec: plain generate: because",
        ]
        assert (stats.fault_count, parent.fault_count) == (1, 3)
        assert stats.reasons == parent.reasons == ["plain generate: because"]


class TestFaults:
    def test_the_last_hundred_are_kept_and_all_are_counted(self) -> None:
        stats = Stats()
        with recording() as caught:
            for i in range(250):
                stats.fault("a", str(i))
            stats.fault("b", "too")
        assert stats.fault_count == 251
        assert stats.faults == [*(f"a: {i}" for i in range(151, 250)), "b: too"]
        assert len(caught) == 2

    def test_a_name_that_begins_another(self) -> None:
        stats = Stats()
        with recording() as caught:
            stats.fault("ngram2", "x")
            stats.fault("ngram", "x")
        assert len(caught) == 2

    def test_a_rare_drafter_beside_a_noisy_one_is_warned_of_once(self) -> None:
        stats = Stats()
        with recording() as caught:
            stats.fault("rare", "x")
            for i in range(150):
                stats.fault("noisy", str(i))
            stats.fault("rare", "x")
        assert len(caught) == 2


class TestReset:
    def test_counts_go_and_facts_stay(self, model: Any) -> None:
        with specdec.speculating(model, Oracle(), POLICY):
            model.generate(prompt(), max_new_tokens=9)
            with recording():
                model.generate(prompt(), use_cache=False, max_new_tokens=2)
            stats = specdec.stats(model)
            assert stats.steps > 0
            stats.reset()
            blank = Stats()
            blank.level, blank.reasons = stats.level, stats.reasons
            assert stats.as_dict() == blank.as_dict()
            assert (stats.level, len(stats.reasons)) == ("tree", 1)
            model.generate(prompt(), max_new_tokens=9)
            assert (specdec.stats(model).generations, specdec.stats(model).plain_generations) == (1, 0)
            assert specdec.stats(model) is stats


class TestOfAModel:
    @pytest.mark.parametrize("drafter", [None, "auto"])
    @pytest.mark.parametrize("batch", [padded(9), padded(9, 4, 7)], ids=["one", "three"])
    @pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.2}, {"return_dict_in_generate": True}], ids=str)
    def test_it_adds_up(self, model: Any, batch: dict[str, Any], arguments: dict[str, Any], drafter: Any) -> None:
        result = both(
            model, batch, drafter=drafter, max_new_tokens=20, eos_token_id=[18, 70, 2], pad_token_id=0, **arguments
        )
        stats, output = result.stats, tiny.sequences(result.ours)
        assert stats.tokens == stats.steps + stats.accepted
        assert stats.drafted == sum(each["drafted"] for each in stats.by_drafter.values())
        assert stats.accepted == sum(each["accepted"] for each in stats.by_drafter.values())
        assert (stats.generations, stats.plain_generations) == (1, 0)
        assert all(0 <= share <= 1 for share in stats.acceptance_by_depth)
        written = [row[9:] for row in output.tolist()]
        assert stats.tokens >= sum(len(row) - row.count(0) for row in written)
        if len(written) == 1:
            assert stats.tokens == len(written[0])

    def test_where_each_token_came_from(self, model: Any) -> None:
        batch = padded(9, 4)
        stats = both(model, batch, max_new_tokens=20, eos_token_id=None).stats
        assert [len(row) for row in stats.sources] == [20, 20]
        assert {name for row in stats.sources for name in row} == {"", "oracle"}
        assert sum(row.count("oracle") for row in stats.sources) == stats.accepted
        assert sum(row.count("") for row in stats.sources) == stats.steps

    def test_the_time_of_every_part_is_taken(self, model: Any) -> None:
        stats = both(model, {"input_ids": prompt()}, max_new_tokens=20).stats
        assert all(stats.seconds[part] > 0 for part in ("prefill", "draft", "verify", "walk", "cache"))

    def test_over_generations(self, model: Any) -> None:
        known = Oracle(texts(model.generate(prompt(), max_new_tokens=20)))
        with specdec.speculating(model, known, POLICY):
            counts = []
            for _ in range(3):
                output = model.generate(prompt(), max_new_tokens=20, return_dict_in_generate=True)
                counts.append(output.stats.as_dict())
            whole = specdec.stats(model).as_dict()
        for name in ("generations", "steps", "tokens", "drafted", "accepted"):
            assert whole[name] == sum(each[name] for each in counts)
        assert whole["seconds"]["verify"] == pytest.approx(sum(each["seconds"]["verify"] for each in counts))

    def test_it_can_be_stored(self, model: Any) -> None:
        stats = both(model, padded(9, 4), drafter="auto", max_new_tokens=20).stats
        again = json.loads(json.dumps(stats.as_dict()))
        assert again == stats.as_dict()
        assert again["level"] == "tree"
        for name in (
            "steps",
            "tokens",
            "drafted",
            "accepted",
            "fault_count",
            "acceptance_by_depth",
            "by_drafter",
            "reasons",
        ):
            assert name in again

    def test_it_shows_itself(self, model: Any) -> None:
        text = repr(both(model, {"input_ids": prompt()}, max_new_tokens=20).stats)
        assert text.startswith("Stats(level='tree', tokens=")
        assert "accepted=" in text
