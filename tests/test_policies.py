"""How much is drafted: the same always, or what measured passes say gives the most tokens per second."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import specdec
from specdec.core import Budget, Context, DraftTree, Policy, Verdict
from specdec.policies import FixedPolicy, ThroughputPolicy
from specdec.policies.throughput import FIRST_PROBE, LAST_PROBE
from tests import tiny
from tests.tiny import Oracle, prompt

SIZES = (1, 2, 4, 8, 16, 32)


def costs(of: Callable[[int], float]) -> dict[int, float]:
    """Times of passes by nodes fed."""
    return {n: of(n) for n in SIZES}


FREE = costs(lambda n: 1.0)
STEEP = costs(lambda n: float(n))


def chain(probability: float, nodes: int = 16) -> DraftTree:
    """A path on which every guess is as likely as the one before it was, given that."""
    return DraftTree.chain(7, [7] * nodes, [probability**i for i in range(1, nodes + 1)], "test")


class World:
    """Steps a policy: passes take ``seconds`` by nodes fed; ``accept`` says how many guesses of a path were right."""

    def __init__(self, policy: ThroughputPolicy, seconds: Callable[[int], float], accept: Callable[[int], int]) -> None:
        self.policy, self.seconds, self.accept = policy, seconds, accept
        self.context = Context([7])

    def step(self, tree: DraftTree) -> int:
        """One step; how many guesses the policy let be verified."""
        (budget,) = self.policy.budget([self.context])
        assert budget.nodes >= len(tree) - 1
        (trimmed,) = self.policy.trim([self.context], [tree])
        guessed = len(trimmed) - 1
        accepted = min(guessed, self.accept(guessed))
        tokens = np.full(accepted + 1, 7)
        verdict = Verdict(trimmed, np.arange(accepted + 1), tokens, seconds=self.seconds(len(trimmed)))
        self.context.extend(verdict)
        return guessed

    def run(self, tree: DraftTree, steps: int) -> list[int]:
        return [self.step(tree) for _ in range(steps)]


def nothing(guessed: int) -> int:
    return 0


def everything(guessed: int) -> int:
    return guessed


class TestThroughput:
    def test_it_is_a_policy(self) -> None:
        assert isinstance(ThroughputPolicy(), Policy)

    @pytest.mark.parametrize("probability", [0.3, 0.6, 0.9])
    @pytest.mark.parametrize("slope", [0.0, 0.02, 0.11, 0.35, 1.0])
    def test_the_size_with_the_most_tokens_per_second(self, slope: float, probability: float) -> None:
        def cost(n: int) -> float:
            return 1 + slope * (n - 1)

        tree = chain(probability)
        rate = [(1 + tree.probability[1 : n + 1].sum()) / cost(n + 1) for n in range(17)]
        policy = ThroughputPolicy(costs(cost))
        (trimmed,) = policy.trim([Context([7])], [tree])
        assert len(trimmed) - 1 == np.argmax(rate)

    def test_nothing_where_passes_cost_too_much(self) -> None:
        assert World(ThroughputPolicy(STEEP), float, nothing).run(chain(0.5), FIRST_PROBE - 1) == [0] * (
            FIRST_PROBE - 1
        )

    def test_all_where_guesses_are_free(self) -> None:
        assert World(ThroughputPolicy(FREE), lambda n: 1.0, everything).run(chain(0.9), 50) == [16] * 50

    def test_the_likeliest_nodes_stay(self) -> None:
        tree = DraftTree(
            np.array([7, 1, 2, 3, 4]),
            np.array([-1, 0, 0, 1, 2]),
            np.array([1, 0.1, 0.9, 0.05, 0.8], np.float32),
            ("",) * 5,
        )
        (trimmed,) = ThroughputPolicy(costs(lambda n: 1 + 0.3 * (n - 1))).trim([Context([7])], [tree])
        assert trimmed.tokens.tolist() == [7, 2, 4]
        assert trimmed.parents.tolist() == [-1, 0, 1]

    def test_the_rows_of_a_batch_get_as_many_nodes_each(self) -> None:
        rows = [Context([7]) for _ in range(3)]
        policy = ThroughputPolicy(costs(lambda n: 1 + 0.1 * (n - 1)))
        assert len(policy.budget(rows)) == 3
        sure, unsure = chain(0.95, 16), chain(0.4, 16)
        alone = [len(policy.trim([Context([7])], [tree])[0]) for tree in (sure, unsure)]
        sizes = [len(tree) for tree in policy.trim(rows, [sure, unsure, DraftTree.root(7)])]
        assert sizes[0] == sizes[1] > sizes[2] == 1
        assert alone[1] < sizes[0] < alone[0]

    def test_a_guess_is_tried_again_ever_more_rarely(self) -> None:
        world = World(ThroughputPolicy(STEEP), float, nothing)
        tried = np.flatnonzero(world.run(chain(0.5), 3000))
        waits = np.diff([-1, *tried])
        assert waits.tolist()[:5] == [FIRST_PROBE, 2 * FIRST_PROBE, 4 * FIRST_PROBE, LAST_PROBE, LAST_PROBE]

    def test_a_try_is_small(self) -> None:
        assert set(World(ThroughputPolicy(STEEP), float, nothing).run(chain(0.5), 200)) == {0, 4}

    def test_nothing_to_try_with(self) -> None:
        assert set(World(ThroughputPolicy(STEEP), float, nothing).run(DraftTree.root(7), 200)) == {0}

    def test_tries_begin_anew_once_drafting_paid(self) -> None:
        world = World(ThroughputPolicy(STEEP), float, nothing)
        world.run(chain(0.5), 500)
        assert world.policy.patience > FIRST_PROBE
        world.policy.seconds[:] = 1.0
        assert world.step(chain(0.5)) > 0
        world.policy.seconds[:] = STEEP[32] * np.arange(1, len(world.policy.seconds) + 1)
        assert np.flatnonzero(world.run(chain(0.5), FIRST_PROBE + 1)).tolist() == [FIRST_PROBE - 1]

    def test_it_learns_that_passes_cost_more_than_was_thought(self) -> None:
        sizes = World(ThroughputPolicy(FREE), lambda n: 1.0 + 2.0 * (n - 1), lambda guessed: 1).run(chain(0.7), 400)
        assert sizes[0] == 16
        assert np.mean(sizes[-100:]) < 1

    @pytest.mark.parametrize("unit", [1e-3, 0.5, 2.0, 5.0])
    def test_it_learns_what_passes_cost_now(self, unit: float) -> None:
        """All of them alike, and not what was thought: in the end that changes nothing."""
        world = World(ThroughputPolicy(FREE), lambda n: unit, everything)
        assert world.run(chain(0.9), 300)[200:] == [16] * 100

    def test_it_learns_that_a_drafter_promises_too_much(self) -> None:
        cost = costs(lambda n: 1 + 0.1 * (n - 1))
        boaster = World(ThroughputPolicy(cost), lambda n: 1 + 0.1 * (n - 1), nothing)
        sizes = boaster.run(chain(0.9), 200)
        assert sizes[0] > 5
        assert np.mean(sizes[-100:]) < 1

    def test_a_try_that_goes_well_brings_guessing_back(self) -> None:
        """The drafter had promised too little."""

        def cost(n: int) -> float:
            return 1 + 0.35 * (n - 1)

        modest = World(ThroughputPolicy(costs(cost)), cost, everything)
        sizes = modest.run(chain(0.3), 3 * FIRST_PROBE)
        assert set(sizes[: FIRST_PROBE - 1]) == {0}
        assert set(sizes[FIRST_PROBE:]) == {1}

    def test_one_freak_measurement_does_not_matter(self) -> None:
        world = World(ThroughputPolicy(FREE), lambda n: 1.0, everything)
        world.run(chain(0.9), 5)
        world.seconds = lambda n: 1000.0
        world.step(chain(0.9))
        world.seconds = lambda n: 1.0
        assert world.run(chain(0.9), 5) == [16] * 5

    def test_a_verdict_is_learnt_from_once(self) -> None:
        world = World(ThroughputPolicy(FREE), lambda n: 3.0, nothing)
        world.step(chain(0.9))
        world.policy.budget([world.context])
        once = world.policy.seconds.copy(), world.policy.accepted
        world.policy.budget([world.context])
        assert np.array_equal(world.policy.seconds, once[0])
        assert world.policy.accepted == once[1]

    def test_the_prompts_own_pass_teaches_nothing(self) -> None:
        policy, context = ThroughputPolicy(FREE), Context([7] * 5)
        before = policy.seconds.copy(), policy.accepted, policy.promised
        context.extend(Verdict(chain(1.0, 4), np.arange(5), np.array([7]), seconds=9.0, prompt=True))
        policy.budget([context])
        assert np.array_equal(policy.seconds, before[0])
        assert (policy.accepted, policy.promised) == before[1:]

    def test_on_a_model_it_stops_guessing_what_is_never_right(self) -> None:
        """And goes on with what is right; passes cost what they cost here."""
        model = tiny.model()
        text = model.generate(prompt(), max_new_tokens=120, eos_token_id=None).tolist()
        drafted = {}
        for known in (text, []):
            with specdec.speculating(model, Oracle(known), ThroughputPolicy(costs(lambda n: 1 + 0.05 * (n - 1)))):
                assert model.generate(prompt(), max_new_tokens=120, eos_token_id=None).tolist() == text
                stats = specdec.stats(model)
            drafted[bool(known)] = stats.drafted / stats.steps
        assert drafted[True] > drafted[False]


class TestFixed:
    def test_the_same_for_every_context(self) -> None:
        contexts = [Context([1]), Context([2])]
        assert FixedPolicy(9, 3, 2, 0.1).budget(contexts) == [Budget(9, 3, 2, 0.1)] * 2

    def test_everything_drafted_is_verified(self) -> None:
        trees = [chain(0.1), DraftTree.root(3)]
        assert FixedPolicy(2).trim([Context([7])] * 2, trees) == trees

    def test_nothing_is_a_size(self) -> None:
        assert FixedPolicy(0).budget([Context([1])])[0].nodes == 0
        model = tiny.model()
        plain = model.generate(prompt(), max_new_tokens=9).tolist()
        with specdec.speculating(model, Oracle(plain), FixedPolicy(0)):
            assert model.generate(prompt(), max_new_tokens=9).tolist() == plain
            assert specdec.stats(model).drafted == 0

    @pytest.mark.parametrize("shape", [(-1,), (4, -1), (4, 4, -2), (4, 0), (4, 4, 0)])
    def test_what_is_no_size(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="give positive numbers, or nodes=0"):
            FixedPolicy(*shape)
