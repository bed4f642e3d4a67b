"""How much is drafted: the same always, or what measured passes say gives the most tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, reduce

import numpy as np
import pytest

import specdec
from specdec.allowance import FIRST, MOST, SHARE, Allowance, Typical
from specdec.calibration import Acceptance, believed
from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Verdict
from specdec.costs import Costs
from specdec.drafters import MergedDrafter, NgramDrafter, RecyclingDrafter
from specdec.policies import FixedPolicy, ThroughputPolicy, throughput
from tests import simulation, tiny
from tests.simulation import KERNELS, PLAIN, QUICK, Clock, Markov, Paced, Played, Text
from tests.tiny import Oracle, prompt

TABLES = {"plain": PLAIN, "kernels": KERNELS, "quick": QUICK}
HOT, WARM = Markov((0.25, 0.15, 0.1)), Markov((0.7, 0.15, 0.1))


def costs(of: Callable[[int], float]) -> Costs:
    """Costs by nodes fed."""
    return Costs({n: of(n) for n in (1, 2, 4, 8, 16, 32)})


def trimmed(policy: ThroughputPolicy, *trees: DraftTree, length: int = 1, drafting: float = 0.0) -> list[DraftTree]:
    """The trees of one step, each of a row of its own, where drafters are believed and everything may be lost."""
    contexts = [Context([7] * length) for _ in trees]
    policy.clock, policy.drafting = (clock := Clock()), Typical(drafting)
    policy.budget(contexts)
    text = contexts[0].scratch[policy][0].text
    text.acceptance = text.hope = Acceptance(believed(), 1e9)
    text.allowance.left = 1e9
    clock.now += drafting
    return policy.trim(contexts, trees)


def chain(probability: float, nodes: int = 16) -> DraftTree:
    """A path on which every guess is as likely as the one before it was, given that."""
    return DraftTree.chain(7, [7] * nodes, [probability**i for i in range(1, nodes + 1)], "test")


def bushy(rng: np.random.Generator) -> DraftTree:
    """Up to 40 nodes anywhere, each with the odds of a power of two, given its parent."""
    n = int(rng.integers(1, 40))
    parents, probability = np.full(n + 1, -1), np.ones(n + 1, np.float32)
    for node in range(1, n + 1):
        parents[node] = rng.integers(0, node)
        odds = 2.0 ** rng.integers(-3, 6)
        probability[node] = probability[parents[node]] * odds / (1 + odds)
    return DraftTree(np.arange(7, n + 8), parents, probability, ("",) * (n + 1))


class TestTheBestSize:
    """What is verified where estimates are right and nothing is uncertain."""

    @pytest.mark.parametrize("probability", [1 / 2, 2 / 3, 8 / 9])
    @pytest.mark.parametrize("slope", [0.0, 0.02, 0.11, 0.35, 1.0])
    def test_has_the_most_tokens_per_second(self, slope: float, probability: float) -> None:
        def cost(n: int) -> float:
            return 1 + slope * (n - 1)

        tree = chain(probability)
        rate = [(1 + tree.probability[1 : n + 1].sum()) / cost(n + 1) for n in range(17)]
        (left,) = trimmed(ThroughputPolicy(costs(cost)), tree)
        assert len(left) - 1 == np.argmax(rate)

    def test_has_the_likeliest_nodes(self) -> None:
        tree = DraftTree(
            np.array([7, 1, 2, 3, 4]),
            np.array([-1, 0, 0, 1, 2]),
            np.array([1, 0.1, 0.9, 0.05, 0.8], np.float32),
            ("",) * 5,
        )
        (left,) = trimmed(ThroughputPolicy(costs(lambda n: 1 + 0.3 * (n - 1))), tree)
        assert left.tokens.tolist() == [7, 2, 4]
        assert left.parents.tolist() == [-1, 0, 1]

    @pytest.mark.parametrize("seed", range(20))
    def test_is_that_of_trying_every_size(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        table, drafting = costs(lambda n: 1 + rng.uniform(0, 0.1) * (n - 1)), float(rng.uniform(0, 0.2))
        drafted = [bushy(rng) for _ in range(1 + seed % 4)]
        rows, ranked = len(drafted), [np.argsort(-tree.probability, kind="stable") for tree in drafted]
        seconds = drafting + table.times(65, 1, rows)
        gains = [tree.probability[order].cumsum() for tree, order in zip(drafted, ranked, strict=True)]
        rate = [np.mean([gain[: n + 1][-1] for gain in gains]) / seconds[n] for n in range(min(40, len(seconds)))]
        left = trimmed(ThroughputPolicy(table), *drafted, drafting=drafting)
        best = int(np.argmax(rate))
        assert best
        for tree, order, kept in zip(drafted, ranked, left, strict=True):
            assert kept.tokens.tolist() == tree.tokens[np.sort(order[: best + 1])].tolist()

    def test_is_the_whole_of_a_sampled_tree_whatever_of_others(self) -> None:
        sampled = replace(chain(1 / 17), law="swor")
        sure, left = trimmed(ThroughputPolicy(costs(lambda n: 1 + 0.2 * (n - 1))), chain(8 / 9), sampled)
        assert 1 < len(sure) < 17
        assert len(left) == 17

    def test_is_the_same_for_the_rows_of_a_batch(self) -> None:
        def left(*trees: DraftTree) -> list[int]:
            policy = ThroughputPolicy(costs(lambda n: 1 + 0.1 * max(0, n - len(trees))))
            return [len(tree) for tree in trimmed(policy, *trees)]

        sure, unsure = chain(16 / 17), chain(1 / 3)
        sizes = left(sure, unsure, DraftTree.root(7))
        assert sizes[0] == sizes[1] > sizes[2] == 1
        assert left(unsure)[0] < sizes[0] < left(sure)[0]

    def test_is_nothing_where_little_is_promised_and_little_may_be_lost(self) -> None:
        """Else the last that may be lost goes for what hardly pays."""

        def left(probability: float, allowance: float) -> int:
            policy, context = ThroughputPolicy(costs(lambda n: 1 + 0.1 * (n - 1)), clock=Clock()), Context([7])
            policy.drafting = Typical(0.0)
            policy.budget([context])
            text = context.scratch[policy][0].text
            text.acceptance = text.hope = Acceptance(believed(), 1e9)
            text.allowance.left = allowance
            return len(policy.trim([context], [chain(probability, 1)])[0]) - 1

        assert (left(1 / 3, 10.0), left(1 / 3, 0.2)) == (1, 0)
        assert (left(8 / 9, 10.0), left(8 / 9, 0.2)) == (1, 1)

    def test_is_asked_with_hope_where_caution_would_verify_something(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a long guess each token is doubted, and the deep ones by all before them, too."""

        def left(slope: float, tree: DraftTree, hope: float | np.ndarray = throughput.HOPE) -> int:
            monkeypatch.setattr(throughput, "HOPE", hope)
            policy, context = ThroughputPolicy(costs(lambda n: 1 + slope * (n - 1)), clock=Clock()), Context([7])
            policy.drafting = Typical(0.0)
            policy.budget([context])
            return len(policy.trim([context], [tree])[0]) - 1

        sure = chain(0.97)
        assert 1 < left(0.1, sure, throughput.CAUTION) < left(0.1, sure) < 16
        # A token of 0.8 is worth 1.8 steps to the hopeful, and 1.72 to the cautious, who decide; 1.11 times what it
        # costs is asked for.
        assert left(0.5, chain(0.8, 1), 1.0) == 1
        assert left(0.6, chain(0.8, 1), 1.0) == 0

    def test_is_larger_where_drafting_takes_long(self) -> None:
        """Since that time is lost with each step."""
        policy = ThroughputPolicy(costs(lambda n: 1 + 0.2 * (n - 1)))
        (quick,), (slow,) = (trimmed(policy, chain(2 / 3), drafting=seconds) for seconds in (0.0, 0.5))
        assert 1 < len(quick) < len(slow)

    def test_is_smaller_behind_a_long_text_where_attention_takes_long(self) -> None:
        policy = ThroughputPolicy(Costs({1: 1.0, 32: 1.5}, attend=1e-4))
        (short,), (long,) = (trimmed(policy, chain(8 / 9), length=length) for length in (10, 5000))
        assert len(short) > len(long) > 1

    def test_a_draft_is_not_asked_for_what_could_never_pay(self) -> None:
        (budget,) = ThroughputPolicy(costs(lambda n: 1 + 0.2 * (n - 1))).budget([Context([7])])
        assert budget == Budget(64, 16, 4, pytest.approx(0.1))
        (budget,) = ThroughputPolicy(costs(lambda n: 1.0)).budget([Context([7])])
        assert budget.least == 0

    def test_many_rows_get_small_trees_and_none_is_no_error(self) -> None:
        policy = ThroughputPolicy(costs(lambda n: 1.0))
        assert {budget.nodes for budget in policy.budget([Context([7])] * 100)} == {9}
        assert {
            budget.nodes for budget in ThroughputPolicy(costs(float)).budget([Context([7]) for _ in range(2000)])
        } == {0}
        assert policy.budget([]) == policy.trim([], []) == []


class Liar:
    """Sure of what is never right."""

    name, topk, hidden = "liar", 0, False

    def __init__(self, probability: float = 0.999) -> None:
        self.probability = probability

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        pairs = zip(contexts, budgets, strict=True)
        return [self.tree(context, min(budget.nodes, budget.depth)) for context, budget in pairs]

    def tree(self, context: Context, depth: int) -> DraftTree:
        chances = [self.probability**i for i in range(1, depth + 1)]
        return DraftTree.chain(int(context.tokens[-1]), [999] * depth, chances, self.name)


class Lucky(Liar):
    """Right about each next token with a fixed chance, and says so."""

    name = "lucky"

    def __init__(self, texts: Sequence[Text], probability: float) -> None:
        super().__init__(probability)
        self.texts = {tuple(prompt): [*prompt, *answer] for prompt, answer in texts}
        self.random = np.random.default_rng(0)

    def tree(self, context: Context, depth: int) -> DraftTree:
        tree = super().tree(context, depth)
        text = self.texts[tuple(context.tokens[: context.prompt_length].tolist())]
        for i, token in enumerate(text[len(context.tokens) :][:depth]):
            if self.random.random() < self.probability:
                tree.tokens[1 + i] = token
        return tree


def both(clock: Clock) -> MergedDrafter:
    """The default drafters, in a simulation."""
    each = simulation.DRAFT / 2
    return MergedDrafter([Paced(NgramDrafter(), clock, each), Paced(RecyclingDrafter(), clock, each)], clock)


def play(
    texts: Sequence[Text],
    drafter: Callable[[Clock], Drafter],
    table: dict[int, float],
    policy: Policy | None = None,
    rows: int = 0,
) -> Played:
    """Decode, so many ``rows`` at a time or all, with what measurement would say of that table; or another policy."""
    clock = Clock()
    policy = policy or ThroughputPolicy(Costs(table), clock=clock)
    parts, rows, seconds = drafter(clock), rows or len(texts), simulation.table(table)
    batches = [texts[i : i + rows] for i in range(0, len(texts), rows)]
    played = [simulation.play(batch, parts, policy, clock, seconds, HOT.candidates) for batch in batches]
    return reduce(Played.__add__, played)


HOPELESS: dict[str, tuple[Callable[[Clock], Drafter], Callable[[int, int], list[int]]]] = {
    "a liar": (lambda clock: Paced(Liar(), clock), simulation.random_text),
    "a half-hearted liar": (lambda clock: Paced(Liar(0.5), clock), simulation.random_text),
    "a slow liar": (lambda clock: Paced(Liar(), clock, 0.005), simulation.random_text),
    "a liar among honest ones": (
        lambda clock: MergedDrafter([*both(clock).drafters, Paced(Liar(), clock)], clock), simulation.random_text,
    ),
    "random tokens": (both, simulation.random_text),
    "few random tokens": (both, lambda seed, length: simulation.random_text(seed, length, vocab=20)),
    "high temperature": (both, HOT.text),
}  # fmt: skip


class TestNeverSlower:
    """Where drafting does not help, what is lost is bounded: in the first 100 tokens, and later."""

    @pytest.mark.parametrize("case", HOPELESS)
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("table", TABLES)
    def test_on_hopeless_text(self, table: str, rows: int, case: str) -> None:
        drafter, text = HOPELESS[case]
        texts = [(text(2 * row, 100), text(2 * row + 1, 400)) for row in range(rows)]
        played = play(texts, drafter, TABLES[table])
        assert min(played.speed(100), played.speed(200), played.speed()) >= 0.98

    @pytest.mark.parametrize("table", ["kernels", "quick"])
    def test_where_it_was_measured_that_twice_as_many_tokens_cost_nothing(self, table: str) -> None:
        """As where the machine was busy just then: four rows of lies seem to come for nothing."""
        text = [([7], simulation.random_text(row, 100)) for row in range(4)]
        seconds, clock = simulation.table(TABLES[table]), Clock()
        policy = ThroughputPolicy(Costs(TABLES[table] | {4: seconds(8)}), clock=clock)
        played = simulation.play(text, Paced(Liar(0.5), clock), policy, clock, seconds)
        assert played.speed() >= 0.98
        assert 0 < sum(4 * (fed - 1) for fed in played.fed) < 80

    @pytest.mark.parametrize("spare", [0.04, 0.1, 0.2, 5.0])
    def test_less_than_half_of_what_plain_steps_save_is_risked(self, spare: float) -> None:
        """Where plain ``generate`` takes longer for its steps than we: up to a twentieth of a step is risked."""
        text = [(simulation.random_text(0, 100, vocab=20), simulation.random_text(1, 600, vocab=20))]
        asked = []
        for known in (0.0, spare):
            clock, seconds = Clock(), simulation.table(QUICK)
            liar = Paced(Liar(0.5), clock)
            policy = ThroughputPolicy(Costs(QUICK, spare=known), clock=clock)
            played = simulation.play(text, liar, policy, clock, seconds)
            asked.append(liar.asked)
            assert min(played.speed(100), played.speed()) >= 0.98 - min(0.5 * max(0.0, known - 0.05), 0.05)
        assert (asked[1] > 1.1 * asked[0]) == (spare > 0.05)

    @pytest.mark.parametrize("table", ["kernels", "quick"])
    def test_the_next_hopeless_text_loses_less(self, table: str) -> None:
        clock, seconds, lost = Clock(), simulation.table(TABLES[table]), []
        policy = ThroughputPolicy(Costs(TABLES[table]), clock=clock)
        for seed in range(2):
            text = [([7], simulation.random_text(seed, 100))]
            lost.append(1 - simulation.play(text, Paced(Liar(), clock), policy, clock, seconds).speed())
        assert lost[0] < 0.02
        assert 0 < lost[1] < 0.8 * lost[0]

    @pytest.mark.parametrize("table", TABLES)
    def test_where_only_the_others_can_be_helped(self, table: str) -> None:
        """A batch takes as long as its slowest row, and that one's passes get no cheaper by what the others guess."""
        hopeless = (simulation.random_text(0, 100), simulation.random_text(1, 300))
        easy = [(text[:100], text[100:]) for text in (simulation.repetitive_text(seed, 400, 0.0) for seed in range(3))]
        played = play([*easy, hopeless], both, TABLES[table])
        assert len(played.seconds) > 290
        assert 300 * played.plain / sum(played.seconds) > 0.96

    @pytest.mark.parametrize("table", TABLES)
    def test_where_what_was_good_turns_bad(self, table: str) -> None:
        """What is known of other texts is only where to start from."""
        texts = [(simulation.repetitive_text(0, 100), simulation.repetitive_text(0, 600)[100:])]
        clock = Clock()
        policy, drafter = ThroughputPolicy(Costs(TABLES[table]), clock=clock), both(clock)
        seconds = simulation.table(TABLES[table])
        assert simulation.play(texts, drafter, policy, clock, seconds).speed() > 1.1
        texts = [(simulation.random_text(1, 100), simulation.random_text(2, 300))]
        assert simulation.play(texts, drafter, policy, clock, seconds).speed(100) >= 0.98

    def test_where_passes_cost_too_much_next_to_nothing_is_asked_or_verified(self) -> None:
        liar = Paced(Liar(), Clock(), seconds=0.02)
        clock = liar.clock
        policy = ThroughputPolicy(costs(float), clock=clock)
        played = simulation.play([([7], simulation.random_text(0, 1000))], liar, policy, clock, float)
        assert max(played.fed) == 1
        assert 0 < liar.asked * 0.02 <= FIRST + SHARE * 1000

    def test_good_text_behind_bad_is_found(self) -> None:
        bad, good = simulation.random_text(0, 500), simulation.repetitive_text(1, 600, novel=0.02)
        played = play([(bad[:100], bad[100:] + good)], both, QUICK)
        late = int(np.searchsorted(np.cumsum(played.tokens), 700))
        assert Played(played.plain, played.seconds[late:], played.tokens[late:]).speed() > 2


class TestDisaster:
    """A call that takes as long as many plain steps."""

    def test_is_not_repeated_at_once_and_hardly_in_later_texts(self) -> None:
        liar = Paced(Liar(), clock := Clock(), 50 * QUICK[1])
        policy, seconds, asked = ThroughputPolicy(Costs(QUICK), clock=clock), simulation.table(QUICK), []
        for seed in range(20):
            text = ([7], simulation.random_text(seed, 150))
            simulation.play([text], liar, policy, clock, seconds)
            asked.append(liar.asked)
        assert asked[0] == 1  # and paid off after 170 tokens
        assert asked[1] == asked[4] == 2  # after 670 more
        assert asked[-1] == 3

    @pytest.mark.parametrize("calls", [1, 2])
    def test_that_only_compiled_something_is_forgotten(self, calls: int) -> None:
        texts = [(GOOD["copies"](2 * i, 100), GOOD["copies"](2 * i + 1, 400)) for i in range(4)]

        class Compiling(Paced):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                self.seconds = 10 * QUICK[1] if self.asked < calls else simulation.DRAFT
                return super().draft(contexts, budgets)

        compiled = play(texts, lambda clock: Compiling(NgramDrafter(), clock), QUICK, rows=1)
        usual = play(texts, lambda clock: Paced(NgramDrafter(), clock), QUICK, rows=1)
        assert compiled.seconds[0] > 10 * QUICK[1]
        assert sum(compiled.seconds) < (1 + 0.2 * calls) * sum(usual.seconds)

    def test_that_loaded_something_is_repeated_at_once(self) -> None:
        """Processes load what another compiled, which takes a few steps, once."""

        class Loading(Paced):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                self.seconds = 0.1 * (self.asked == 0) + simulation.DRAFT
                return super().draft(contexts, budgets)

        made = list[Loading]()

        def loading(clock: Clock) -> Drafter:
            made.append(Loading(NgramDrafter(), clock))
            return MergedDrafter([made[0]], clock)

        play([(simulation.random_text(0, 50), simulation.random_text(1, 12))], loading, QUICK)
        assert made[0].asked > 8


GOOD: dict[str, Callable[[int, int], list[int]]] = {
    "copies": lambda seed, length: simulation.repetitive_text(seed, length, novel=0.02),
    "phrases": simulation.repetitive_text,
    "warm": WARM.text,
    "hot": HOT.text,
}
AGAINST_BEST = {"plain": 0.85, "kernels": 0.95, "quick": 0.9}  # a wrong guess costs most of a plain step in the first
FIXED = [(0, 1, 1), (2, 2, 1), (4, 4, 1), (4, 4, 4), (8, 8, 1), (8, 4, 4), (16, 16, 1), (16, 8, 4), (32, 16, 4)]
ALONE: dict[str, Callable[[Clock], Drafter]] = {
    "both": both,
    "ngram": lambda clock: Paced(NgramDrafter(), clock),
    "recycling": lambda clock: Paced(RecyclingDrafter(), clock),
}


@cache
def fixed(text: str, rows: int) -> list[Played]:
    """Every fixed size of every drafter on a text; what they do does not depend on what passes take."""
    return [play(good(text), ALONE[name], QUICK, FixedPolicy(*size), rows) for name in ALONE for size in FIXED]


def good(text: str) -> list[Text]:
    """Eight texts of a kind, each with its own prompt: of fewer, luck says more than the policy."""
    return [(GOOD[text](2 * i, 100), GOOD[text](2 * i + 1, 400)) for i in range(8)]


def speed(played: Played, rows: int, table: dict[int, float]) -> float:
    """Of fixed sizes, had passes taken what another table says."""
    seconds = simulation.table(table)
    drafting = [simulation.DRAFT if fed > 1 else 0.0 for fed in played.fed]
    taken = sum(seconds(rows * fed) for fed in played.fed) + sum(drafting)
    return seconds(rows) * sum(played.tokens) / taken


class TestAgainstHindsight:
    """No fixed size of any drafter, chosen when all is known, is much better."""

    @pytest.mark.parametrize("text", GOOD)
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("table", TABLES)
    def test_one_policy_for_all(self, table: str, rows: int, text: str) -> None:
        best = max(speed(played, rows, TABLES[table]) for played in fixed(text, rows))
        assert play(good(text), both, TABLES[table], rows=rows).speed() >= AGAINST_BEST[table] * best

    @pytest.mark.parametrize("seconds", [0.003, 0.01])
    def test_a_slow_drafter_is_used_for_what_it_is_worth(self, seconds: float) -> None:
        texts = [(simulation.random_text(0, 100), simulation.random_text(1, 3000))]
        drafter = lambda clock: Paced(Lucky(texts, 0.8), clock, seconds)  # noqa: E731
        best = max(play(texts, drafter, QUICK, FixedPolicy(*size)).speed() for size in FIXED if size[2] == 1)
        assert best > 1.5
        assert play(texts, drafter, QUICK).speed() >= 0.95 * best

    def test_large_trees_where_they_cost_nothing(self) -> None:
        texts = [(simulation.random_text(0, 100), simulation.random_text(1, 600))]
        played = play(texts, lambda clock: Paced(Lucky(texts, 0.97), clock), {1: 1.0, 64: 1.05})
        assert max(played.fed) == 17
        assert played.speed() > 8


class TestLearning:
    def test_it_is_a_policy(self) -> None:
        assert isinstance(ThroughputPolicy(), Policy)

    @pytest.mark.parametrize("unit", [0.012, 0.5, 5.0])
    def test_that_the_machine_is_quicker_or_slower_than_was_thought_changes_little(self, unit: float) -> None:
        clock, seconds = Clock(), simulation.table(QUICK)
        drafter, policy = both(clock), ThroughputPolicy(Costs(QUICK), clock=clock)
        taken = lambda fed: unit * seconds(fed) / seconds(1)  # noqa: E731
        played = reduce(
            Played.__add__, [simulation.play([text], drafter, policy, clock, taken) for text in good("copies")]
        )
        assert played.speed() > 0.9 * play(good("copies"), both, QUICK).speed()

    def test_that_large_passes_cost_more_than_was_thought(self) -> None:
        texts = [(simulation.random_text(0, 100), simulation.random_text(1, 600))]
        clock = Clock()
        policy = ThroughputPolicy(costs(lambda n: 1.0), clock=clock)
        played = simulation.play(texts, Paced(Lucky(texts, 0.6), clock), policy, clock, lambda fed: 1 + 0.5 * (fed - 1))
        assert np.mean(played.fed[:5]) > 4
        assert np.mean(played.fed[-100:]) <= 4.75

    def test_a_moment_of_a_slow_machine_is_forgotten(self) -> None:
        texts, clock, seconds = good("phrases"), Clock(), simulation.table(KERNELS)
        passes = iter(range(10_000))
        policy = ThroughputPolicy(Costs(KERNELS), clock=clock)
        slow = lambda fed: seconds(fed) * (10 if 100 <= next(passes) < 110 else 1)  # noqa: E731
        disturbed = reduce(
            Played.__add__, [simulation.play([each], both(clock), policy, clock, slow) for each in texts]
        )
        assert speed(disturbed, 1, KERNELS) > 0.95 * play(texts, both, KERNELS, rows=1).speed()

    def test_a_step_at_rest_reads_the_times_of_two_sizes_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, context = ThroughputPolicy(Costs(KERNELS), clock=Clock()), Context([7])
        policy.budget([context])
        context.scratch[policy][0].text.allowance.left = -1.0
        context.extend(Verdict(*policy.trim([context], [chain(0.9)]), np.arange(1), np.array([5]), seconds=0.041))
        monkeypatch.setattr(Costs, "times", None)
        assert policy.budget([context]) == [Budget(0, 0, 0)]
        assert len(policy.trim([context], [DraftTree.root(5)])[0]) == 1

    def test_a_verdict_is_learnt_from_once(self) -> None:
        policy, context = ThroughputPolicy(costs(lambda n: 1.0), clock=Clock()), Context([7])
        policy.budget([context])
        (tree,) = policy.trim([context], [chain(0.9)])
        context.extend(Verdict(tree, np.arange(1), np.array([5]), seconds=3.0))
        policy.budget([context])
        once = policy.costs.curve.copy(), policy.acceptance.offered.copy()
        assert once[0].max() > 1
        assert once[1].max() > policy.acceptance.offered.min()
        policy.budget([context])
        assert np.array_equal(policy.costs.curve, once[0])
        assert np.array_equal(policy.acceptance.offered, once[1])

    def test_the_prompts_own_pass_teaches_nothing(self) -> None:
        policy, context = ThroughputPolicy(costs(lambda n: 1.0)), Context([7] * 5)
        context.extend(Verdict(chain(1.0, 4), np.arange(5), np.array([7]), seconds=9.0, prompt=True))
        policy.budget([context])
        assert set(policy.costs.curve) == {1.0}
        assert set(policy.acceptance.offered) == {policy.acceptance.offered.min()}

    def test_rows_that_have_ended_are_still_fed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int, int, float]] = []
        monkeypatch.setattr(Costs, "learn", lambda self, *what: seen.append(what))
        texts = [([1], simulation.random_text(0, 5)), ([2], simulation.random_text(1, 60))]
        play(texts, lambda clock: Paced(Liar(), clock), KERNELS)
        seconds = simulation.table(KERNELS)
        assert [(rows, taken) for _, _, rows, taken in seen] == [(2, seconds(2 * nodes)) for nodes, *_ in seen]
        assert {context for _, context, *_ in seen} == set(range(1, 60))

    def test_on_a_model_it_guesses_what_is_right_and_stops_guessing_what_is_never_right(self) -> None:
        """Passes cost what they cost here, drafting next to nothing."""
        model = tiny.model()
        text = model.generate(prompt(), max_new_tokens=120, eos_token_id=None).tolist()
        drafted = {}
        for known in (text, []):
            policy = ThroughputPolicy(costs(lambda n: 1 + 0.05 * (n - 1)), clock=Clock())
            with specdec.speculating(model, Oracle(known), policy):
                assert model.generate(prompt(), max_new_tokens=120, eos_token_id=None).tolist() == text
                stats = specdec.stats(model)
            drafted[bool(known)] = stats.drafted / stats.steps
        assert drafted[True] > drafted[False]


class TestAllowance:
    def test_whatever_is_tried_no_more_is_lost_than_it_says(self) -> None:
        rng, allowance, lost = np.random.default_rng(0), Allowance(), 0.0
        for step in range(1, 1000):
            risk = float(rng.uniform(0, FIRST))
            loss = risk if allowance.covers(risk) else 0.0
            allowance.settle(1.0, -loss)
            lost += loss
            assert lost <= FIRST + SHARE * step + 1e-9
        assert lost > SHARE * 500

    def test_what_is_won_may_be_lost_again_up_to_a_most(self) -> None:
        allowance = Allowance()
        allowance.settle(1.0, 1000.0)
        assert allowance.left == MOST

    def test_what_is_too_dear_is_tried_and_paid_off(self) -> None:
        allowance = Allowance()
        assert allowance.covers(10.0)
        allowance.settle(1.0, -10.0)
        assert not allowance.covers(0.0)

    def test_two_odd_measurements_of_five_do_not_count(self) -> None:
        typical = Typical(1.0)
        for value in (100.0, 2.0, 100.0, 3.0, 2.0):
            typical.see(value)
        assert typical.value == 3.0


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
