"""MergedDrafter: one tree of many, compared fairly, cut to the budget; a bad part harms nobody."""

from pathlib import Path

import numpy as np
import pytest

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree, Verdict
from specdec.drafters import LookaheadDrafter, MergedDrafter, NgramDrafter, RecyclingDrafter, SuffixDrafter
from specdec.drafters.merged import FAULTS_KEPT
from tests.simulation import Clock, Paced

WIDE = Budget(nodes=64, depth=8, width=8)


class Fixed:
    """Drafts the same tree after every token: ``{path: probability}``."""

    topk, hidden = 0, False

    def __init__(self, name, paths):
        self.name, self.paths = name, paths

    def draft(self, contexts, budgets):
        return [self.tree(int(context.tokens[-1])) for context in contexts]

    def tree(self, root):
        places = {(): 0} | {path: i for i, path in enumerate(self.paths, 1)}
        tokens = np.array([root, *(path[-1] for path in self.paths)], np.int64)
        parents = np.array([-1, *(places[path[:-1]] for path in self.paths)], np.int64)
        return DraftTree(tokens, parents, np.array([1, *self.paths.values()], np.float32), (self.name,) * len(tokens))


class Broken(Fixed):
    def __init__(self, name="broken", error=None):
        super().__init__(name, {(1,): 0.5})
        self.error = error or RuntimeError("no luck")

    def draft(self, contexts, budgets):
        raise self.error


def paths_of(tree):
    """Each path's probability and source."""
    paths = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], int(tree.tokens[node])))
    return {path: (float(p), s) for path, p, s in zip(paths[1:], tree.probability[1:], tree.source[1:], strict=True)}


def draft(drafter, text=(7,), budget=WIDE):
    return drafter.draft([Context(list(text))], [budget])[0]


def play(drafter, truth, steps, budget=WIDE):
    """The loop against a target that goes on as ``truth()`` says, a run of tokens for each step; the drafted trees."""
    context, drafted = Context([0]), []
    for _ in range(steps):
        [tree] = drafter.draft([context], [budget])
        coming = np.array(truth())
        path = trees.follow(tree.tokens, tree.parents, coming[:-1])
        context.extend(Verdict(tree, path, coming[: len(path)]))
        drafted.append(tree)
    return drafted


def test_the_union_has_every_path_once_and_names_its_first_drafter():
    first = Fixed("a", {(1,): 0.6, (1, 2): 0.4})
    second = Fixed("b", {(1,): 0.5, (1, 3): 0.3, (4,): 0.2})
    drafter = MergedDrafter([first, second])
    assert isinstance(drafter, Drafter)
    assert drafter.name == "a+b"
    tree = draft(drafter)
    assert {path: source for path, (_, source) in paths_of(tree).items()} == {
        (1,): "a",
        (1, 2): "a",
        (1, 3): "b",
        (4,): "b",
    }
    assert tree.law is None
    assert tree.tokens[0] == 7


def test_before_anything_is_learnt_estimates_are_believed():
    paths = {(1,): 0.8, (1, 2): 0.4, (3,): 0.05, (1, 2, 5): 0.01}
    for path, (probability, _) in paths_of(draft(MergedDrafter([Fixed("a", paths)]))).items():
        assert probability == pytest.approx(paths[path], rel=0.5)


def test_it_wants_what_any_part_wants():
    class Greedy(Fixed):
        topk, hidden = 5, True

    drafter = MergedDrafter([NgramDrafter(), RecyclingDrafter(k=3), Greedy("greedy", {})])
    assert (drafter.topk, drafter.hidden) == (5, True)
    assert MergedDrafter([NgramDrafter(), RecyclingDrafter(k=3)]).hidden is False
    with pytest.raises(ValueError, match="at least one"):
        MergedDrafter([])


def test_a_merged_part_stands_for_its_own_parts():
    a, b, c = (Fixed(name, {(i,): 0.5}) for i, name in enumerate("abc"))
    drafter = MergedDrafter([MergedDrafter([a, b]), c])
    assert drafter.drafters == (a, b, c)
    assert sorted(source for _, source in paths_of(draft(drafter)).values()) == ["a", "b", "c"]


@pytest.mark.parametrize("budget", [Budget(3, 8, 8), Budget(9, 2, 8), Budget(9, 8, 1), Budget(9, 8, 8, 0.3)])
def test_the_budget_keeps_the_likeliest(budget):
    first = Fixed("a", {(1,): 0.9, (1, 2): 0.8, (1, 2, 3): 0.1, (5,): 0.04})
    second = Fixed("b", {(6,): 0.01, (1,): 0.9, (1, 4): 0.08, (1, 4, 9): 0.06})
    full = draft(MergedDrafter([first, second]))
    tree = draft(MergedDrafter([first, second]), budget=budget)
    limits = budget.nodes, budget.depth, budget.width
    assert trees.fault(tree.tokens, tree.parents, tree.probability, 7, 100, *limits) is None
    kept = trees.prune(full.parents, full.probability, *limits, budget.least)
    assert paths_of(tree) == paths_of(full.take(kept))
    assert 1 < len(tree) < len(full)
    assert len(draft(MergedDrafter([first, second]), budget=Budget(0, 0, 0))) == 1


def test_who_promises_too_much_is_found_out():
    boaster = Fixed("boaster", {(1,): 0.9, (1, 1): 0.8, (1, 1, 1): 0.7})
    honest = Fixed("honest", {(2,): 0.3, (2, 2): 0.1})
    drafter, rng = MergedDrafter([boaster, honest], clock=lambda: 0.0), np.random.default_rng(0)
    one = Budget(1, 8, 8)
    assert draft(drafter, budget=one).source[1] == "boaster"
    play(drafter, lambda: [2 if rng.random() < 0.5 else 9] * 3, 100)
    tree = draft(drafter)
    found = paths_of(tree)
    assert found[(1,)][0] < 0.1
    assert found[(2,)][0] == pytest.approx(0.5, abs=0.12)
    assert found[(2, 2)][0] / found[(2,)][0] > 0.8  # of those whose parent was accepted, all were
    assert draft(drafter, budget=one).source[1] == "honest"


def test_depths_are_told_apart():
    part = Fixed("a", {(1,): 0.5, (1, 1): 0.25, (1, 1, 1): 0.125})
    drafter = MergedDrafter([part], clock=lambda: 0.0)
    play(drafter, lambda: [1, 9, 9], 100)
    found = paths_of(draft(drafter))
    assert found[(1,)][0] > 0.9
    assert found[(1, 1)][0] < 0.1


def test_what_several_agree_on_is_likelier():
    rng = np.random.default_rng(1)

    class Noisy(Fixed):
        """Right with probability 0.6, and always as sure."""

        def draft(self, contexts, budgets):
            guess = coming[0] if rng.random() < 0.6 else int(rng.integers(100, 10_000))
            self.paths = {(guess,): 0.6}
            return super().draft(contexts, budgets)

    coming = [5, 5]
    drafter = MergedDrafter([Noisy("a", {}), Noisy("b", {})], clock=lambda: 0.0)
    drafted = play(drafter, lambda: coming, 400)[200:]
    agreed = [float(tree.probability[1]) for tree in drafted if len(tree) == 2]
    disputed = [float(tree.probability[1]) for tree in drafted if len(tree) == 3]
    assert np.mean(agreed) > 0.9
    assert np.mean(disputed) == pytest.approx(0.24 / 0.64, abs=0.12)


def test_a_part_that_raises_is_left_out_and_its_faults_are_handed_over_once():
    drafter = MergedDrafter([Broken(), Fixed("good", {(1,): 0.5})])
    for _ in range(FAULTS_KEPT + 5):
        assert draft(drafter).source == ("good", "good")
    assert drafter.take_faults() == [("broken", "RuntimeError: no luck")] * FAULTS_KEPT
    assert drafter.take_faults() == []


def test_where_all_parts_fail_the_root_is_left():
    drafter = MergedDrafter([Broken(error=MemoryError("full"))])
    assert draft(drafter).tokens.tolist() == [7]
    with pytest.raises(KeyboardInterrupt):
        draft(MergedDrafter([Broken(error=KeyboardInterrupt())]))


class Unsound(Fixed):
    def __init__(self, name, make):
        super().__init__(name, {(1,): 0.5})
        self.make = make

    def draft(self, contexts, budgets):
        return self.make(super().draft(contexts, budgets))


def changed(tree, **arrays):
    fields = {"tokens": tree.tokens, "parents": tree.parents, "probability": tree.probability} | arrays
    return DraftTree(**fields, source=tree.source)


@pytest.mark.parametrize(
    "make",
    [
        lambda drafted: [],
        lambda drafted: None,
        lambda drafted: [None],
        lambda drafted: [DraftTree.root(3)],
        lambda drafted: [changed(drafted[0], parents=np.array([-1, 5]))],
        lambda drafted: [changed(drafted[0], probability=np.array([1, np.nan], np.float32))],
        lambda drafted: [changed(drafted[0], tokens=np.array([7, -4]))],
    ],
)
def test_a_part_with_unsound_trees_is_left_out(make):
    drafter = MergedDrafter([Unsound("odd", make), Fixed("good", {(1,): 0.5})])
    assert draft(drafter).source == ("good", "good")
    assert drafter.faults[0][0] == "odd"


def test_a_finished_context_is_let_go():
    drafter = MergedDrafter([NgramDrafter(), RecyclingDrafter(k=2), Fixed("a", {(1,): 0.5})])
    context = Context([1, 2, 1, 2, 1])
    drafter.draft([context], [WIDE])
    assert context.scratch
    context.finished = True
    budgets = []
    drafter.drafters[2].draft = lambda contexts, given: budgets.extend(given) or [DraftTree.root(1)]
    drafter.draft([context], [Budget(0, 0, 0)])
    assert budgets == [Budget(0, 0, 0)]
    assert not context.scratch


def test_contexts_of_a_batch_keep_their_own_trees():
    drafter = MergedDrafter([NgramDrafter(), RecyclingDrafter()])
    texts = [[1, 2, 3, 1, 2], [4, 5], [6, 7, 6]]
    drafted = drafter.draft([Context(text) for text in texts], [WIDE, WIDE, Budget(1, 1, 1)])
    assert [int(tree.tokens[0]) for tree in drafted] == [2, 5, 6]
    assert [len(tree) for tree in drafted] == [9, 1, 2]
    assert drafter.draft([], []) == []


class Noise:
    """A target that mostly goes on with one successor of each token, now and then with another."""

    def __init__(self, seed, vocab=200, k=8):
        rng = self.rng = np.random.default_rng(seed)
        self.candidates, self.k = np.array([rng.permutation(vocab)[:k] for _ in range(vocab)]), k

    def next(self, token):
        return int(self.candidates[token, self.rng.choice(3, p=[0.7, 0.2, 0.1])])

    def play(self, drafter, steps, budget):
        context = Context([1])
        for _ in range(steps):
            [tree] = drafter.draft([context], [budget])
            path, tokens, node = [], [], 0
            while node >= 0:
                path.append(node)
                tokens.append(self.next(tree.tokens[node]))
                node = trees.child(tree.tokens, tree.parents, node, tokens[-1])
            context.extend(Verdict(tree, np.array(path), np.array(tokens), self.candidates[tree.tokens]))
        return len(context.tokens) / steps


def test_together_they_guess_no_worse_than_the_best_alone():
    budget = Budget(12, 6, 4)
    make = [NgramDrafter, RecyclingDrafter, lambda: MergedDrafter([NgramDrafter(), RecyclingDrafter()], lambda: 0.0)]
    ngram, recycling, merged = (Noise(seed=2).play(each(), 400, budget) for each in make)
    assert merged > 0.97 * max(ngram, recycling)
    assert merged > 2


class Asked(Fixed):
    """Counts what it is asked."""

    def __init__(self, name, paths):
        super().__init__(name, paths)
        self.asked = self.told = 0

    def draft(self, contexts, budgets):
        wanted = any(budget.nodes for budget in budgets)
        self.asked, self.told = self.asked + wanted, self.told + (not wanted)
        drafted = super().draft(contexts, budgets)
        return drafted if wanted else [DraftTree.root(int(context.tokens[-1])) for context in contexts]


def payments(*parts, steps=1000, truth=(1, 9), step=0.1):
    """How often each part is asked, of ``steps`` of ``step`` seconds, where (part, seconds of its call) are given."""
    clock = Clock()
    drafter = MergedDrafter([Paced(part, clock, seconds) for part, seconds in parts], clock)

    def passes():
        clock.now += step
        return list(truth)

    play(drafter, passes, steps)
    assert all(part.asked + part.told == steps for part, _ in parts), "a part not asked is told to catch up"
    return [part.asked / steps for part, _ in parts]


def test_a_part_that_does_not_pay_is_asked_seldom_and_again_and_again():
    right, wrong = Asked("right", {(1,): 0.5}), Asked("wrong", {(2,): 0.9})
    assert payments((right, 0.001), (wrong, 0.02)) == [1.0, pytest.approx(0.035, abs=0.02)]


def test_a_part_that_costs_next_to_nothing_need_not_pay():
    assert payments((Asked("wrong", {(2,): 0.9}), 0.0001)) == [1.0]


def test_a_part_pays_by_what_no_cheaper_one_guesses():
    cheap, dear = Asked("cheap", {(1,): 0.5}), Asked("dear", {(1,): 0.5})
    assert payments((dear, 0.02), (cheap, 0.001)) == [pytest.approx(0.035, abs=0.02), 1.0]
    deeper = Asked("deeper", {(1,): 0.5, (1, 5): 0.4})
    assert payments((deeper, 0.02), (Asked("cheap", {(1,): 0.5}), 0.001), truth=(1, 5, 9)) == [1.0, 1.0]


def test_a_dear_part_that_pays_is_asked_every_time():
    assert payments((Asked("dear", {(1,): 0.5, (1, 5): 0.4}), 0.03), truth=(1, 5, 9)) == [1.0]


def test_a_part_that_comes_to_pay_is_found():
    part = Asked("late", {(2,): 0.9})
    clock = Clock()
    drafter = MergedDrafter([Paced(part, clock, 0.02)], clock)

    def passes(token):
        clock.now += 0.1
        return [token, 9]

    play(drafter, lambda: passes(1), 300)
    before = part.asked
    play(drafter, lambda: passes(2), 300)
    assert before < 60
    assert part.asked - before > 200


def test_a_part_whose_first_call_compiled_something_is_soon_asked_again():
    class Compiling(Paced):
        def draft(self, contexts, budgets):
            self.seconds = 0.0001 if self.asked else 2.0
            return super().draft(contexts, budgets)

    clock, part = Clock(), Asked("right", {(1,): 0.5})

    def passes():
        clock.now += 0.1
        return [1, 9]

    play(MergedDrafter([Compiling(part, clock)], clock), passes, 300)
    assert part.asked > 200


def test_where_nothing_is_wanted_who_learns_from_verdicts_catches_up_and_nobody_owes_anything():
    part, learner = Asked("part", {(2,): 0.9}), Asked("learner", {(2,): 0.9})
    learner.topk = 4
    clock = Clock()
    drafter = MergedDrafter([Paced(part, clock, 1.0), learner], clock)
    trees_drafted = play(drafter, lambda: [1, 1], 50, budget=Budget(0, 0, 0))
    assert {len(tree) for tree in trees_drafted} == {1}
    assert (part.asked, part.told, learner.asked, learner.told) == (0, 0, 0, 50)
    play(drafter, lambda: [1, 1], 1)
    assert part.asked == 1


class TestFile:
    """What the parts have learnt, in one file."""

    @staticmethod
    def learnt(text: list[int], k: int = 8) -> MergedDrafter:
        merged = MergedDrafter([NgramDrafter(), SuffixDrafter(), LookaheadDrafter(), RecyclingDrafter(k=k)])
        context = Context(text[:1])
        context.extend(Verdict(DraftTree.root(text[0]), np.zeros(1, np.int64), np.array(text[1:]), prompt=True))
        context.finished = True
        merged.draft([context], [Budget(0, 0, 0)])
        return merged

    def test_a_loaded_drafter_guesses_what_the_saved_one_does(self, tmp_path: Path) -> None:
        saved, fresh = self.learnt([5, 6, 7, 8, 9, 5, 6, 7]), self.learnt([0, 1])
        budget = [Budget(8, 8, 2)]
        due, before = (each.draft([Context([6, 7])], budget)[0].tokens.tolist() for each in (saved, fresh))
        saved.save(tmp_path / "file")
        fresh.load(tmp_path / "file")
        assert len(due) > 2
        assert before != due
        assert fresh.draft([Context([6, 7])], budget)[0].tokens.tolist() == due
        fresh.reset()
        assert fresh.draft([Context([6, 7])], budget)[0].tokens.tolist() == [7]
        assert saved.bytes_used > 0

    def test_how_far_each_part_is_believed_and_what_they_share(self, tmp_path: Path) -> None:
        first, second = Fixed("a", {(1,): 0.9, (3,): 0.05}), Fixed("b", {(2,): 0.3, (3,): 0.2})
        saved, fresh = (MergedDrafter([first, second], clock=lambda: 0.0) for _ in range(2))
        rng = np.random.default_rng(2)
        play(saved, lambda: [int(rng.choice([1, 2, 3, 9], p=[0.1, 0.4, 0.4, 0.1])), 9], 60)
        assert paths_of(draft(fresh)) != paths_of(draft(saved))
        saved.save(tmp_path / "file")
        fresh.load(tmp_path / "file")
        assert paths_of(draft(fresh)) == paths_of(draft(saved))

    def test_what_does_not_suit_one_part_changes_none(self, tmp_path: Path) -> None:
        self.learnt([5, 6, 7, 8], k=4).save(tmp_path / "file")
        ours = self.learnt([5, 6, 9, 9])
        with pytest.raises(ValueError, match="k=8"):
            ours.load(tmp_path / "file")
        assert ours.draft([Context([5, 6])], [Budget(1, 1, 1)])[0].tokens.tolist() == [6, 9]

    def test_a_file_of_other_drafters(self, tmp_path: Path) -> None:
        MergedDrafter([NgramDrafter()]).save(tmp_path / "file")
        with pytest.raises(ValueError, match=r"of the drafters \['ngram'\]"):
            self.learnt([1, 2]).load(tmp_path / "file")
