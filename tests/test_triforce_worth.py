"""A hierarchy is used where it pays and rests where it does not; by a clock that only the loop moves."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.allowance import FIRST, MOST, SHARE, Allowance
from specdec.core import Budget, Context, Drafter, DraftTree, Verdict
from specdec.costs import Costs
from specdec.drafters import MergedDrafter, NgramDrafter, TriForceDrafter
from specdec.drafters.middle import SURE, Middle
from specdec.drafters.triforce_worth import BUILDS, PATIENCE, Text, Worth
from specdec.policies import FixedPolicy, ThroughputPolicy
from tests import simulation, tiny
from tests.simulation import Clock, Paced, Played

PASSES = {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1, 16: 1.2, 32: 1.5}  # seconds of the target's over all rows, by tokens
BUILD, STEPS = 4.0, 600
LAST = torch.zeros(1000)


class Nothing:
    """Guesses nothing."""

    name, topk, hidden = "nothing", 0, False

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        return [DraftTree.root(int(context.tokens[-1])) for context in contexts]


class Level(Middle):
    """A middle level that takes its time, and is right about each token of a known text by chance."""

    def __init__(self, text: np.ndarray, right: float, clock: Clock, seconds: float) -> None:
        self.known, self.right, self.clock, self.seconds = text, right, clock, seconds
        self.agreed, self.builds, self.passes = SURE, 0, 0
        self._guessed, self._guessed_at, self._length = list[int](), 0, 0
        self.random = np.random.default_rng(0)

    @property
    def length(self) -> int:
        return self._length

    def learn(self, tokens: np.ndarray) -> None:
        super().learn(tokens)
        self._length = len(tokens) - 1

    def refresh(self, root: int, anew: bool) -> None:
        if anew:
            self.clock.now += BUILD
            self.builds, self.built_at, self.agreed = self.builds + 1, self.length, max(self.agreed, SURE)

    def write(self, tree: DraftTree, *arguments: Any) -> tuple[Verdict, list[torch.Tensor]]:
        self.clock.now += self.seconds
        self.passes += 1
        coming = int(self.known[len(self.text.tokens) % len(self.known)])
        token = coming if self.random.random() < self.right else 999
        return Verdict(tree, np.zeros(1, np.int64), np.array([token])), [LAST]


class Hierarchy(TriForceDrafter):
    """TriForce whose middle level is a ``Level`` in every text."""

    def __init__(self, clock: Clock, seconds: float, right: float, budget: int = 16) -> None:
        super().__init__(Nothing(), budget, clock=clock)
        self.seconds, self.right, self.levels = seconds, right, list[Level]()

    def begin(self, text: np.ndarray) -> None:
        """Know what is coming in the next text."""
        self.levels.append(Level(text, self.right, self.clock, self.seconds))

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        for context in contexts:
            if context.steps == 0:
                context.scratch.setdefault(self, self.levels[-1])
        return super().draft(contexts, budgets)


def played(drafter: Drafter, level: Hierarchy, clock: Clock, texts: int = 1, policy: Any = None) -> list[Played]:
    """Texts without any pattern, one after another."""
    policy, runs = policy or ThroughputPolicy(Costs(PASSES), clock=clock), []
    for seed in range(texts):
        text = simulation.random_text(2 * seed, 50), simulation.random_text(2 * seed + 1, STEPS)
        level.begin(np.array([*text[0], *text[1]]))
        runs.append(simulation.play([text], drafter, policy, clock, simulation.table(PASSES)))
    return runs


def lost(run: Played) -> float:
    """Plain steps more than plain decoding takes; negative where time is won."""
    return sum(run.seconds) / run.plain - sum(run.tokens)


# By the chance to be right and seconds: how many times plain decoding's speed.
PAYS = {(0.95, 0.05): 4.0, (0.95, 0.15): 2.5, (0.7, 0.15): 1.3, (0.6, 0.1): 1.2}
FAILS = [(0.95, 0.95), (0.7, 0.95), (0.3, 0.6), (0.0, 0.15)]
TRY = BUILD + 1.0  # the first, which says what the next would take


def allowed(texts: int) -> float:
    """Plain steps that may be lost on so many texts, and one for the last draft."""
    return TRY + FIRST + SHARE * texts * STEPS + 1


class TestAlone:
    @pytest.mark.parametrize(("right", "seconds"), PAYS)
    def test_where_the_full_pass_is_dear_it_is_used(self, right: float, seconds: float) -> None:
        level = Hierarchy(clock := Clock(), seconds, right)
        assert min(run.speed() for run in played(level, level, clock, texts=2)) > PAYS[right, seconds]

    @pytest.mark.parametrize("policy", [None, FixedPolicy(8, 8, 1)], ids=["throughput", "fixed"])
    @pytest.mark.parametrize(("right", "seconds"), FAILS)
    def test_where_it_does_not_pay_it_rests(self, right: float, seconds: float, policy: Any) -> None:
        level = Hierarchy(clock := Clock(), seconds, right)
        runs = played(level, level, clock, 3, policy)
        assert lost(runs[0]) < allowed(1)
        assert sum(map(lost, runs)) < allowed(3)
        assert 0 < level.levels[0].passes < STEPS / 5
        assert sum(each.builds for each in level.levels) <= 4

    def test_a_text_that_fits_the_budget_costs_nothing(self) -> None:
        level = Hierarchy(clock := Clock(), 0.95, 0.95, budget=1024)
        (run,) = played(level, level, clock)
        assert level.levels[0].passes == 0
        assert lost(run) == 0

    def test_what_a_long_text_has_taught_a_short_one_need_not_find_out(self) -> None:
        """A pass over all rows takes longer the longer the text, as the cost model knows; the middle level's do not."""
        read, level = 4e-4, Hierarchy(clock := Clock(), 0.25, 0.95)
        policy = ThroughputPolicy(Costs({n: 0.2 * each for n, each in PASSES.items()}, read), clock=clock)
        for length in (2000, 100, 2000):
            text = simulation.random_text(length, length), simulation.random_text(1, 200)
            level.begin(np.array([*text[0], *text[1]]))
            table = simulation.table({n: 0.2 * each + read * length for n, each in PASSES.items()})
            run = simulation.play([text], level, policy, clock, table)
            assert run.speed() > (1.4 if length == 2000 else 0.99)
        assert [each.passes > 20 for each in level.levels] == [True, False, True]

    def test_rows_of_a_batch_wait_for_one_another(self) -> None:
        """Each row's draft takes its time; what pays for one row may not for four."""
        used = []
        for rows in (1, 4):
            level = Hierarchy(clock := Clock(), 0.4, 0.9)
            texts = [(simulation.random_text(7, 50), simulation.random_text(8, 200))] * rows
            level.begin(np.array([*texts[0][0], *texts[0][1]]))
            run = simulation.play(
                texts, level, FixedPolicy(8, 8, 1), clock, lambda fed, rows=rows: 1 + 0.01 * (fed - rows)
            )
            used.append(level.levels[0].passes / rows)
            assert run.speed() > (1.3 if rows == 1 else 0.94)
        assert used[0] > 3 * used[1]


class TestDepth:
    """Where a pass over all rows takes one second, a token of the middle level 0.3, and verifying them 1 or 2."""

    @staticmethod
    def depth(agreed: float, verifying: float) -> int:
        """How many tokens are written, where that was tried once."""
        worth, scratch = Worth(), dict[Any, Any]()
        for steps, seconds in ((1, 1.0), (2, verifying)):
            verdict = SimpleNamespace(prompt=False, seconds=seconds)
            context = SimpleNamespace(
                steps=steps, verdict=verdict, tokens=np.zeros(steps), scratch=scratch, finished=False
            )
            worth.learn(context, rows=1)
            worth.wrote(context, [1], False, 0.3)
        worth.allowance = Allowance(MOST)
        return worth.depth(context, 6, agreed, anew=False)

    def test_where_it_is_known_not_to_pay_nothing_is_written(self) -> None:
        assert [self.depth(agreed, 1.0) for agreed in (0.2, 0.4, 0.7, 0.95)] == [0, 1, 2, 3]

    def test_a_pass_that_verifies_may_be_dearer(self) -> None:
        assert [self.depth(agreed, 2.0) for agreed in (0.4, 0.7, 0.95)] == [0, 0, 3]


class TestPatience:
    """Of a cache that takes five seconds to build, where a pass over all rows takes one."""

    @staticmethod
    def waits(*lasted: int) -> list[float]:
        """How long each cache is to serve at least, where those before it have served for so many tokens."""
        worth, tokens, waits = Worth(), 1000, list[float]()
        scratch = {worth: Text(step=1.0)}
        for served in (0, *lasted):
            tokens += served
            worth.wrote(SimpleNamespace(scratch=scratch, tokens=range(tokens)), [1], True, 5.0)
            waits.append(worth.patience(SimpleNamespace(scratch=scratch)))
        return waits

    def test_a_cache_pays_for_itself(self) -> None:
        assert self.waits() == [BUILDS * 5]

    def test_while_builds_do_not_help_they_become_rare(self) -> None:
        assert self.waits(10, 21, 45, 81, 128) == [10, 20, 40, 80, PATIENCE, PATIENCE]

    def test_one_that_helped_may_be_followed_soon(self) -> None:
        assert self.waits(10, 21, 80) == [10, 20, 40, 10]
        assert self.waits(10, 40, 256) == [10, 20, 10, 10]


class TestAmongOthers:
    """As a part of a merged drafter, which asks it only where it pays."""

    @staticmethod
    def merged(level: Hierarchy, clock: Clock) -> MergedDrafter:
        return MergedDrafter([Paced(NgramDrafter(), clock, 0.001), level], clock)

    @pytest.mark.parametrize(("right", "seconds"), [(0.95, 0.05), (0.7, 0.15)])
    def test_where_the_full_pass_is_dear_it_is_used(self, right: float, seconds: float) -> None:
        level = Hierarchy(clock := Clock(), seconds, right)
        (run,) = played(self.merged(level, clock), level, clock)
        assert run.speed() > 1.25

    @pytest.mark.parametrize(("right", "seconds"), FAILS)
    def test_where_it_does_not_pay_it_is_hardly_asked(self, right: float, seconds: float) -> None:
        level = Hierarchy(clock := Clock(), seconds, right)
        runs = played(self.merged(level, clock), level, clock, 3)
        assert sum(map(lost, runs)) < 0.02 * 3 * STEPS
        assert sum(each.passes for each in level.levels) < STEPS / 4

    def test_what_a_cheaper_part_finds_as_well_is_left_to_it(self) -> None:
        text, runs = (simulation.repetitive_text(3, 50, 0.0), simulation.repetitive_text(3, STEPS, 0.0)), []
        for alone in (False, True):
            level = Hierarchy(clock := Clock(), 0.1, 0.9)
            level.begin(np.array([*text[0], *text[1]]))
            drafter = Paced(NgramDrafter(), clock, 0.001) if alone else self.merged(level, clock)
            policy = ThroughputPolicy(Costs(PASSES), clock=clock)
            runs.append(simulation.play([text], drafter, policy, clock, simulation.table(PASSES)))
        merged, ngrams = (sum(run.seconds) for run in runs)
        assert merged < ngrams + allowed(1) + FIRST  # the hierarchy's own allowance, and the merge's for it


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
@pytest.mark.parametrize("policy", ["auto", FixedPolicy(6, 6, 1)], ids=["auto", "fixed"])
def test_output_is_plain_generates(policy: Any, sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hierarchy among other parts: where all goes by what passes take here, and where drafts take no time."""
    model, passes, write = tiny.model(max_position_embeddings=1024), list[int](), Middle.write
    monkeypatch.setattr(Middle, "write", lambda self, *given: passes.append(1) or write(self, *given))
    still: dict[str, Any] = {} if policy == "auto" else {"clock": lambda: 0.0}
    hierarchy = TriForceDrafter(NgramDrafter(), budget=64, **still)
    drafter = MergedDrafter([NgramDrafter(), hierarchy], **still)
    asked = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": sample, "top_k": 5}
    torch.manual_seed(3)
    plain = model.generate(tiny.prompt(300), **asked)
    with specdec.speculating(model, drafter, policy, on_unsupported="error"):
        torch.manual_seed(3)
        assert model.generate(tiny.prompt(300), **asked).tolist() == plain.tolist()
        assert specdec.stats(model).fault_count == 0
    assert passes or policy == "auto"
