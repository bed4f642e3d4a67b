"""Drafting during passes: which trees are handed out, that nobody is asked twice, and that tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec import trees
from specdec.ahead import FORESEEN, Ahead, left, useful
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.decoder import Decoder
from specdec.drafters import (
    GrammarDrafter,
    LookaheadDrafter,
    MergedDrafter,
    NgramDrafter,
    PredictedOutput,
    RecyclingDrafter,
    RetrievalDrafter,
    SmallModelDrafter,
    SuffixDrafter,
)
from specdec.drafters.merged import Part
from specdec.graphs import Judged
from specdec.model import Model, Pass
from specdec.policies import FixedPolicy
from specdec.pool import SessionPool
from specdec.speculate import auto_drafter
from specdec.statistics import Stats
from specdec.verifiers import PathwiseVerifier
from tests import tiny
from tests.tiny import VOCAB, padded, prompt, texts

POLICY = FixedPolicy(12, 5, 6)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Reader:
    """Guesses the true next tokens of texts that it knows, as one likely chain; some of them wrong.

    Attributes:
        asked: for each call, each context's steps, budget, whether it was finished, and whether a pass was under way.
    """

    name, hidden, ahead = "reader", False, True
    busy = False  # set while a pass is under way

    def __init__(self, known: Sequence[Sequence[int]], topk: int = 0, wrong: int = 0) -> None:
        self.texts = [np.array(text) for text in known]
        self.topk, self.wrong = topk, wrong
        self.asked: list[list[tuple[int, int, Budget, bool, bool]]] = []
        self.drafted: list[DraftTree] = []

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One chain per context."""
        self.asked.append(
            [(id(c), c.steps, budget, c.finished, Reader.busy) for c, budget in zip(contexts, budgets, strict=True)]
        )
        self.drafted = [self.chain(c.tokens, budget) for c, budget in zip(contexts, budgets, strict=True)]
        return self.drafted

    def chain(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        n = len(tokens)
        coming = next((text[n:] for text in self.texts if np.array_equal(text[:n], tokens)), tokens[:0])
        coming = coming[: min(budget.depth, budget.nodes)].tolist()
        if self.wrong:
            coming = [(t + 1) % VOCAB if (n + i) % self.wrong == 0 else t for i, t in enumerate(coming)]
        return DraftTree.chain(int(tokens[-1]), coming, [0.99 ** (i + 1) for i in range(len(coming))], self.name)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the host were free while a pass runs."""
    for module in ("specdec.speculate", "specdec.pool.engine"):
        monkeypatch.setattr(f"{module}.useful", lambda drafter, device: useful(drafter, CUDA))


@pytest.fixture(autouse=True)
def _passes_are_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forward, wait, step = Model.forward, Pass.wait, Decoder.step

    def launch(model: Any, batch: Any, hidden: bool = False) -> Pass:
        passed = forward(model, batch, hidden)
        Reader.busy = True
        return passed

    def done(passed: Pass) -> None:
        Reader.busy = False
        wait(passed)

    def begin(*args: Any) -> None:
        Reader.busy = False  # a self-test's passes are not waited for
        step(*args)

    monkeypatch.setattr(Decoder, "step", begin)
    monkeypatch.setattr(Model, "forward", launch)
    monkeypatch.setattr(Pass, "wait", done)
    yield
    Reader.busy = False


def run(model: Any, drafter: Any, arguments: dict[str, Any], policy: Any = POLICY, **more: Any) -> specdec.Stats:
    """Generate with the drafter, the same tokens as without; what was counted."""
    torch.manual_seed(0)
    plain = model.generate(**arguments).tolist()
    with specdec.speculating(model, drafter, policy, on_unsupported="error", **more):
        torch.manual_seed(0)
        assert model.generate(**arguments).tolist() == plain
        return specdec.stats(model)


def known(model: Any, arguments: dict[str, Any], seed: int = 0) -> list[list[int]]:
    """The texts that plain ``generate`` writes."""
    torch.manual_seed(seed)
    return texts(model.generate(**arguments), arguments["attention_mask"])


def ending(model: Any, arguments: dict[str, Any]) -> int:
    """A token that ends some row of a generation early, if there are several another one later, and none at once."""
    width = arguments["input_ids"].shape[1]
    torch.manual_seed(0)
    rows = [row[width:] for row in model.generate(**arguments).tolist()]
    first = {t: [row.index(t) if t in row else 60 for row in rows] for row in rows for t in row}
    fit = {t: at for t, at in first.items() if 15 <= min(at) < 50 and (len(rows) == 1 or max(at) - min(at) >= 5)}
    return max(fit, key=lambda t: max(fit[t]))


class TestWhatIsLeft:
    TREE = DraftTree(
        np.array([9, 4, 5, 6, 7, 8]),
        np.array([-1, 0, 0, 1, 3, 3]),
        np.array([1, 0.8, 0.1, 0.75, 0.6, 0.15], np.float32),
        ("", "a", "b", "c", "d", "e"),
    )

    def test_the_tree_below_with_estimates_given_the_path(self) -> None:
        found = left(self.TREE, np.array([4, 6]))
        assert found is not None
        assert found.tokens.tolist() == [6, 7, 8]
        assert found.parents.tolist() == [-1, 0, 0]
        assert found.source == ("", "d", "e")
        np.testing.assert_allclose(found.probability, [1, 0.8, 0.2], rtol=1e-6)
        assert found.probability.dtype == np.float32

    def test_a_sibling_in_between_is_left_out(self) -> None:
        found = left(self.TREE, np.array([4]))
        assert found is not None
        assert found.tokens.tolist() == [4, 6, 7, 8]
        assert found.parents.tolist() == [-1, 0, 1, 1]

    @pytest.mark.parametrize("tokens", [[4, 6, 7], [4, 6, 7, 5]], ids=["at its end", "behind its end"])
    def test_nothing_where_it_ends(self, tokens: list[int]) -> None:
        found = left(self.TREE, np.array(tokens))
        assert found is not None
        assert found.tokens.tolist() == tokens[-1:]

    @pytest.mark.parametrize("tokens", [[5], [4, 6, 8], [7], [3], [4, 7], [4, 6, 5], [4, 6, 7, 5, 5]])
    def test_news(self, tokens: list[int]) -> None:
        assert left(self.TREE, np.array(tokens)) is None

    def test_a_sampled_tree_is_not_used_again(self) -> None:
        sampled = DraftTree(self.TREE.tokens, self.TREE.parents, self.TREE.probability, self.TREE.source, law="swor")
        assert left(sampled, np.array([4])) is None

    def test_random_trees(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            n = int(rng.integers(2, 20))
            parents = np.array([-1, *(int(rng.integers(0, i)) for i in range(1, n))])
            likely = np.ones(n, np.float32)
            for i in range(1, n):
                likely[i] = likely[parents[i]] * np.float32(rng.uniform(0.7, 1))
            tree = DraftTree(np.arange(n), parents, likely, ("",) * n)
            node = int(rng.integers(1, n))
            path = [node]
            while parents[path[-1]] > 0:
                path.append(int(parents[path[-1]]))
            found = left(tree, np.array(path[::-1]))
            if likely[node] < FORESEEN:
                assert found is None
                continue
            assert found is not None
            assert trees.fault(found.tokens, found.parents, found.probability, node, n, n, n, n) is None
            for at, token in enumerate(found.tokens.tolist()[1:], 1):
                assert found.tokens[found.parents[at]] == parents[token]
                assert found.probability[at] == pytest.approx(likely[token] / likely[node], rel=1e-5)
            assert len(found) == 1 + sum(node in ancestors(parents, i) for i in range(n))


def ancestors(parents: np.ndarray, node: int) -> list[int]:
    found = []
    while (node := int(parents[node])) >= 0:
        found.append(node)
    return found


def stepped(ahead: Ahead, context: Context, text: Sequence[int], budget: Budget, meanwhile: bool = True) -> DraftTree:
    """One step against the rest of a text."""
    (tree,) = ahead.draft([context], [budget])
    if meanwhile:
        ahead.meanwhile()
    coming = np.array(text[len(context.tokens) :])
    path = trees.follow(tree.tokens, tree.parents, coming[:-1])
    context.extend(Verdict(tree, path, coming[: len(path)]))
    return tree


class TestSteps:
    TEXT = (np.arange(200) % 90).tolist()
    BUDGET = Budget(6, 4, 3, 0.1)

    def test_a_ready_tree_is_that_of_the_last_draft_within_the_budget(self) -> None:
        reader, stats, context = Reader([self.TEXT], wrong=23), Stats(), Context(self.TEXT[:5])
        ahead, used = Ahead(reader, stats), 0
        while len(context.tokens) < 190:
            calls, before, length = len(reader.asked), reader.drafted, len(context.tokens)
            (tree,) = ahead.draft([context], [self.BUDGET])
            assert tree.tokens[0] == context.tokens[-1]
            assert len(tree) - 1 <= self.BUDGET.nodes
            assert trees.depths(tree.parents).max() <= self.BUDGET.depth
            assert tree.probability[1:].min(initial=1) >= self.BUDGET.least
            if len(reader.asked) == calls:
                used += 1
                (last,) = before
                start = last.tokens.tolist().index(int(tree.tokens[0]))
                assert tree.tokens.tolist() == last.tokens[start : start + len(tree)].tolist()
                assert len(tree) > 1
            ahead.meanwhile()
            assert len(reader.asked) == calls + 1  # once a step, before or during the pass
            assert reader.asked[-1][0][1] == context.steps
            coming = np.array(self.TEXT[length:])
            path = trees.follow(tree.tokens, tree.parents, coming[:-1])
            context.extend(Verdict(tree, path, coming[: len(path)]))
        assert used > 20
        assert stats.drafts_ahead == used
        assert used / 2 < stats.drafts_ahead_used < used

    def test_who_does_not_foresee_is_asked_as_usual(self) -> None:
        reader, context = Reader([self.TEXT], wrong=3), Context(self.TEXT[:5])
        ahead = Ahead(reader, Stats())
        for _ in range(10):
            tree = stepped(ahead, context, self.TEXT, self.BUDGET)
            assert reader.drafted[0] is tree
        assert {call[0][2] for call in reader.asked} == {self.BUDGET}

    def test_one_row_that_is_surprised_has_all_asked(self) -> None:
        reader, ahead = Reader([self.TEXT], wrong=0), None
        contexts = [Context(self.TEXT[:5]), Context(self.TEXT[:7])]
        ahead = Ahead(reader, Stats())
        for _ in range(4):
            ahead.draft(contexts, [self.BUDGET] * 2)
            ahead.meanwhile()
            for context in contexts:
                n = len(context.tokens)
                context.extend(Verdict(DraftTree.root(0), np.zeros(1, np.int64), np.array(self.TEXT[n : n + 1])))
        calls = len(reader.asked)
        ahead.draft(contexts, [self.BUDGET] * 2)
        assert len(reader.asked) == calls  # ready
        ahead.meanwhile()
        contexts[0].extend(Verdict(DraftTree.root(0), np.zeros(1, np.int64), np.array([95])))
        contexts[1].extend(
            Verdict(DraftTree.root(0), np.zeros(1, np.int64), np.array(self.TEXT[len(contexts[1].tokens) :][:1]))
        )
        ahead.draft(contexts, [self.BUDGET] * 2)
        assert len(reader.asked) == calls + 2
        assert len(reader.asked[-1]) == 2

    def test_catching_up_waits_for_the_pass_and_the_end_does_not(self) -> None:
        reader, context, nothing = Reader([self.TEXT]), Context(self.TEXT[:5]), Budget(0, 0, 0)
        stats = Stats()
        ahead = Ahead(reader, stats)
        (tree,) = ahead.draft([context], [nothing])
        assert (len(tree), reader.asked) == (1, [])
        ahead.meanwhile()
        ahead.meanwhile()
        assert [call[0][2] for call in reader.asked] == [nothing]
        assert (stats.drafts_ahead, stats.drafts_ahead_used) == (0, 0)
        context.finished = True
        ahead.draft([context], [nothing])
        assert len(reader.asked) == 2

    def test_what_is_left_is_cut_to_the_budget(self) -> None:
        reader, context = Reader([self.TEXT]), Context(self.TEXT[:5])
        ahead = Ahead(reader, Stats())
        ahead.draft([context], [Budget(20, 20, 3)])
        context.extend(Verdict(DraftTree.root(4), np.zeros(1, np.int64), np.array([5])))
        (tree,) = ahead.draft([context], [Budget(20, 20, 3, 0.9)])
        assert tree.tokens.tolist() == list(range(5, 16))  # 0.99 ** 11 is less
        for budget in (Budget(20, 3, 3), Budget(3, 20, 3)):
            ahead, context = Ahead(reader, Stats()), Context(self.TEXT[:5])
            stepped(ahead, context, self.TEXT, budget)
            ahead.draft([context], [budget])  # the text is as foreseen, so of this more is kept in mind
            context.extend(Verdict(DraftTree.root(8), np.zeros(1, np.int64), np.array([9])))
            calls = len(reader.asked)
            (tree,) = ahead.draft([context], [budget])
            assert len(reader.asked) == calls
            assert tree.tokens.tolist() == [9, 10, 11, 12]

    def test_a_tree_that_ends_too_soon_is_not_handed_out(self) -> None:
        reader, context = Reader([self.TEXT[:16]]), Context(self.TEXT[:5])
        ahead = Ahead(reader, Stats())
        for _ in range(2):
            stepped(ahead, context, self.TEXT, self.BUDGET)
        (last,), calls = reader.drafted, len(reader.asked)
        assert (len(context.tokens), last.tokens[-1]) == (15, 15)  # one guess is left, of which the whole promised four
        ahead.draft([context], [self.BUDGET])
        assert len(reader.asked) == calls + 1


@pytest.mark.usefixtures("forced")
class TestGenerations:
    @pytest.mark.parametrize("lengths", [(9,), (9, 4, 7)], ids=["one", "three"])
    @pytest.mark.parametrize("more", [{}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("early", [False, True], ids=["to the end", "ending early"])
    def test_the_same_tokens(self, model: Any, lengths: tuple[int, ...], more: dict[str, Any], early: bool) -> None:
        arguments = {**padded(*lengths), "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0, **more}
        if early:
            arguments["eos_token_id"] = ending(model, arguments)
        stats = run(model, Reader(known(model, arguments), wrong=29), arguments)
        assert stats.fault_count == 0
        assert stats.drafts_ahead_used > 0

    @pytest.mark.parametrize("make", [auto_drafter, NgramDrafter, SuffixDrafter, RecyclingDrafter, LookaheadDrafter])
    @pytest.mark.parametrize("policy", [POLICY, "auto"], ids=["fixed", "auto"])
    def test_drafters_of_ours(self, model: Any, make: Any, policy: Any) -> None:
        arguments = {**padded(9, 4, 7), "max_new_tokens": 80, "eos_token_id": None, "do_sample": False}
        assert run(model, make(), arguments, policy).fault_count == 0

    def test_a_long_copy_is_mostly_drafted_ahead(self, model: Any) -> None:
        arguments = {**padded(9), "max_new_tokens": 200, "eos_token_id": None}
        stats = run(model, Reader(known(model, arguments)), arguments)
        batch_steps = stats.steps - 1
        assert stats.drafts_ahead > 0.9 * batch_steps - 3
        assert stats.drafts_ahead_used > 0.9 * batch_steps - 4
        assert stats.tokens_per_step > 5
        assert stats.as_dict()["drafts_ahead"] == stats.drafts_ahead

    @pytest.mark.parametrize("policy", [POLICY, FixedPolicy(0)], ids=["guessing", "resting"])
    def test_every_verdict_is_seen_once(self, model: Any, policy: Any) -> None:
        arguments = {**padded(9, 4, 7), "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
        arguments["eos_token_id"] = ending(model, arguments)
        reader = Reader(known(model, arguments), topk=4, wrong=31)
        run(model, reader, arguments, policy)
        calls = [each for call in reader.asked for each in call]
        for context in {each[0] for each in calls}:
            seen = [(steps, finished) for who, steps, _, finished, _ in calls if who == context]
            live = [steps for steps, finished in seen if not finished]
            assert live == list(range(1, len(live) + 1))
            assert sum(finished for _, finished in seen) == 1
        during = [call[0][4] for call in reader.asked]
        assert any(during)
        assert all(during[:-1]) or policy is POLICY
        assert not during[-1]  # the end, which no pass follows

    def test_drafters_that_fail_cost_speed_alone(self, model: Any) -> None:
        class Fails(Reader):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                drafted = super().draft(contexts, budgets)
                if Reader.busy:
                    raise RuntimeError("not now")
                return drafted

        arguments = {**padded(9, 4), "max_new_tokens": 60, "eos_token_id": None}
        with tiny.quietly():
            stats = run(model, Fails(known(model, arguments)), arguments)
        assert stats.fault_count == stats.drafts_ahead > 0
        assert "not now" in stats.faults[0]
        assert stats.accepted > 0
        assert stats.drafts_ahead_used == 0

    def test_nonsense_is_not_kept(self, model: Any) -> None:
        class Lies(Reader):
            def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
                drafted = super().draft(contexts, budgets)
                if Reader.busy:
                    for tree in drafted:
                        tree.parents[1:] = 1 << 40
                return drafted

        arguments = {**padded(9), "max_new_tokens": 60, "eos_token_id": None}
        with tiny.quietly():
            stats = run(model, Lies(known(model, arguments)), arguments)
        assert stats.fault_count > 0
        assert stats.drafts_ahead_used == 0

    def test_a_merged_drafter_settles_every_token_once(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        settled = []
        settle = Part.settle

        def note(part: Part, tokens: float, *rest: Any) -> None:
            settled.append(tokens)
            settle(part, tokens, *rest)

        monkeypatch.setattr(Part, "settle", note)
        arguments = {**padded(9), "max_new_tokens": 100, "eos_token_id": None}

        class Sure(Reader):
            name = "sure"

        merged = MergedDrafter([Sure(known(model, arguments)), NgramDrafter()], clock=lambda: 0.0)
        stats = run(model, merged, arguments)
        assert stats.drafts_ahead > 0
        assert sum(settled) / 2 <= 99  # each of the two parts, of every token but the first
        assert sum(settled) / 2 >= 99 - 6  # of the last step, nothing may have been asked for

    def test_traces_do_not_stand_in_the_way(self, model: Any, tmp_path: Any) -> None:
        arguments = {**padded(9), "max_new_tokens": 60, "eos_token_id": None}
        stats = run(model, Reader(known(model, arguments)), arguments, trace=tmp_path / "trace.jsonl")
        assert stats.drafts_ahead_used > 3

    def test_a_verifier_that_would_not_call_it_is_left_alone(self, model: Any) -> None:
        class Bound:
            def __init__(self, verifier: Any) -> None:
                self.first, self.verify = verifier.first, verifier.verify

        class Other(PathwiseVerifier):
            def begin(self, *args: Any, **kwargs: Any) -> Any:
                return Bound(super().begin(*args, **kwargs))

        arguments = {**padded(9), "max_new_tokens": 40, "eos_token_id": None}
        reader = Reader(known(model, arguments), topk=4)
        assert run(model, reader, arguments, verifier=Other()).drafts_ahead == 0
        assert [call[0][1] for call in reader.asked[:-1]] == list(range(1, len(reader.asked)))

    def test_in_a_pool(self, model: Any) -> None:
        asked = [prompt(9, seed=seed) for seed in range(5)]
        arguments = {"max_new_tokens": 50, "eos_token_id": None}
        plain = [model.generate(ids, **arguments)[0].tolist() for ids in asked]
        reader = Reader(plain, topk=4)
        with SessionPool(model, drafter=reader, policy=POLICY, max_rows=3) as pool:
            answers = [pool.submit(ids, **arguments) for ids in asked]
            assert [answer.result()[0].tolist() for answer in answers] == plain
            assert pool.stats.drafts_ahead_used > 0
            assert pool.stats.fault_count == 0


class TestWhen:
    def test_not_on_the_cpu(self, model: Any) -> None:
        arguments = {**padded(9), "max_new_tokens": 40, "eos_token_id": None}
        reader = Reader(known(model, arguments))
        assert run(model, reader, arguments).drafts_ahead == 0
        assert not any(call[0][4] for call in reader.asked)
        assert {call[0][2].nodes for call in reader.asked} <= {0, 12}
        with SessionPool(model, drafter=reader, policy=POLICY) as pool:
            pool.generate(prompt(9), max_new_tokens=20)
            assert pool.stats.drafts_ahead == 0

    def test_drafters_of_text_alone(self, tmp_path: Any) -> None:
        for drafter in (auto_drafter(), NgramDrafter(), SuffixDrafter(), LookaheadDrafter(), RecyclingDrafter()):
            assert useful(drafter, CUDA)
            assert not useful(drafter, CPU)
        assert useful(PredictedOutput([1, 2]), CUDA)
        assert getattr(RetrievalDrafter, "ahead", False)
        for kind in (SmallModelDrafter, GrammarDrafter):
            assert not getattr(kind, "ahead", False)

    def test_all_parts_must_allow_it(self) -> None:
        class Other(Reader):
            ahead = False

        assert useful(MergedDrafter([NgramDrafter(), Reader([])]), CUDA)
        assert not useful(MergedDrafter([NgramDrafter(), Other([])]), CUDA)
        assert useful(SuffixDrafter(fallback=Reader([])), CUDA)
        assert not useful(SuffixDrafter(fallback=Other([])), CUDA)
        assert not useful(object(), CUDA)


class TestOrder:
    """Launch, then the host's own work, then the wait."""

    def verifier(self, events: list[str], **model: Any) -> Any:
        sampler = SimpleNamespace(
            quick=True, groups=[[0]], finished=[False], generated=[[]], commit_quick=lambda *_: False, pad=None, ends=()
        )
        kept = SimpleNamespace(lengths=[4], advance=lambda paths: None, keep=lambda paths: None, graphs=None)
        vars(kept).update(model)
        bound = PathwiseVerifier().begin(kept, sampler, Stats())  # type: ignore[arg-type]
        bound.meanwhile = lambda: events.append("meanwhile")
        return bound

    def test_of_a_pass(self) -> None:
        events = list[str]()

        def forward(batch: Any, hidden: bool) -> Any:
            events.append("launch")
            logits = torch.nn.functional.one_hot(torch.tensor([[6, 7]]), 9).float()
            return SimpleNamespace(logits=logits, hidden=None, wait=lambda: events.append("wait"))

        (verdict,) = self.verifier(events, forward=forward).verify([], [DraftTree.chain(5, [6], [0.5], "a")])
        assert verdict.tokens.tolist() == [6, 7]
        assert events == ["launch", "meanwhile", "wait"]

    def test_of_a_graph(self) -> None:
        events = list[str]()

        def wait() -> Judged:
            events.append("wait")
            return Judged([np.array([0, 1])], np.array([7]), np.array([[[6], [7]]]))

        def launch(batch: Any, lengths: Any) -> Any:
            events.append("launch")
            return wait

        graphs = SimpleNamespace(ready=lambda *_: SimpleNamespace(launch=launch))
        (verdict,) = self.verifier(events, graphs=graphs).verify([], [DraftTree.chain(5, [6], [0.5], "a")])
        assert verdict.tokens.tolist() == [6, 7]
        assert events == ["launch", "meanwhile", "wait"]

    def test_drafting_meanwhile_is_not_counted_as_the_passs_time(self) -> None:
        spent = Stats()

        def forward(batch: Any, hidden: bool) -> Any:
            logits = torch.nn.functional.one_hot(torch.tensor([[6, 7]]), 9).float()
            return SimpleNamespace(logits=logits, hidden=None, wait=lambda: None)

        bound = self.verifier([], forward=forward)
        bound.stats = spent
        inside = list[float]()
        bound.meanwhile = lambda: inside.append(spent.seconds["verify"])
        bound.verify([], [DraftTree.chain(5, [6], [0.5], "a")])
        assert 0 < inside[0] < spent.seconds["verify"]  # the clock was stopped, and went on after it
