"""SuffixDrafter: the published rule over two trees, memory between contexts, and what it is kept from."""

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import storage, trees
from specdec.core import Budget, Context, Drafter, DraftTree, Verdict
from specdec.drafters import suffix_file
from specdec.drafters.suffix import KEPT, SuffixDrafter, prior
from specdec.drafters.suffix_draft_numba import KINDS
from specdec.drafters.suffix_tree import SuffixTree

BUDGET = Budget(nodes=32, depth=32, width=32)
NOTHING = Budget(0, 0, 0)


def extend(context, tokens):
    tokens = np.asarray(tokens, np.int64)
    context.extend(Verdict(DraftTree.root(int(context.tokens[-1])), np.zeros(1, np.int64), tokens))


def draft(drafter, text, budget=BUDGET, namespace="", prompt=None):
    """Of a text that arrives in two pieces."""
    context = Context(text[: prompt or len(text)], namespace)
    drafter.draft([context], [NOTHING])
    if prompt:
        extend(context, text[prompt:])
    return drafter.draft([context], [budget])[0]


def play(drafter, text, prompt, budget=BUDGET, namespace="", finish=True):
    """Decode ``text`` from its ``prompt`` first tokens on, each step checked; how many steps it took."""
    context, steps = Context(text[:prompt], namespace), 0
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [budget])
        last, limits = int(context.tokens[-1]), (budget.nodes, budget.depth, budget.width)
        assert trees.fault(tree.tokens, tree.parents, tree.probability, last, 2**62, *limits) is None
        assert (tree.probability >= budget.least).all()
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        context.extend(Verdict(tree, path, truth[: len(path)]))
        steps += 1
    if finish:
        context.finished = True
        assert len(drafter.draft([context], [NOTHING])[0]) == 1
        assert not context.scratch
    return steps


def agent_text(seed, length=600):
    """Fresh text in which little repeats."""
    return np.random.default_rng(seed).integers(0, 3000, length)


class Fixed:
    """Always guesses 7, where it may, and notes its budgets."""

    name, topk, hidden = "fixed", 3, True

    def __init__(self):
        self.budgets = []

    def draft(self, contexts, budgets):
        self.budgets += budgets
        roots = [int(context.tokens[-1]) for context in contexts]
        return [DraftTree.chain(root, [7] * min(b.nodes, 1), [0.5] * min(b.nodes, 1), "fixed") for root, b in
                zip(roots, budgets, strict=True)]  # fmt: skip


def test_it_is_a_drafter_and_asks_nothing_of_the_target():
    drafter = SuffixDrafter()
    assert isinstance(drafter, Drafter)
    assert (drafter.name, drafter.topk, drafter.hidden) == ("suffix", 0, False)


def test_a_path_is_drafted_from_the_own_text_and_grows_with_the_match():
    text = [*range(10, 30), 5, *range(10, 13)]
    tree = draft(SuffixDrafter(mode="path"), text)
    assert tree.tokens.tolist() == [12, 13, 14, 15]
    assert trees.is_chain(tree.parents)
    assert draft(SuffixDrafter(mode="path", factor=2.0), text).tokens.tolist() == [12, *range(13, 19)]
    assert draft(SuffixDrafter(mode="path", offset=1.0), text).tokens.tolist() == [12, *range(13, 17)]
    assert len(draft(SuffixDrafter(min_probability=0.6), text)) == 1  # one of two occurrences goes on: 1/2
    assert draft(SuffixDrafter(mode="path"), text, prompt=7).tokens.tolist() == [12, 13, 14, 15]


def test_a_tree_holds_the_alternatives_that_a_path_must_choose_from():
    text = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    path, tree = draft(SuffixDrafter(mode="path"), text), draft(SuffixDrafter(), text)
    assert sorted(tree.tokens[tree.parents == 0].tolist()) == [3, 4]
    assert len(path) == len(tree) == 3  # a match of 2: 2 guesses
    assert path.tokens.tolist() == [2, 3, 9]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=150), st.integers(1, 20), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_drafts_stay_within_their_budget(text, nodes, depth, width):
    for mode in ("tree", "path"):
        drafter = SuffixDrafter(mode=mode)
        for least in (0.0, 0.2):
            play(drafter, text, 1, Budget(nodes, depth, width, least))
    for budget in (NOTHING, Budget(4, 0, 4), Budget(4, 4, 0)):
        assert len(draft(drafter, text, budget)) == 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_the_better_of_two_trees_wins_and_the_own_one_ties(texts, cut):
    memory, own, text = SuffixTree(8), SuffixTree(8), np.array(texts[-1])
    for other in texts[:-1]:
        memory.extend(np.array(other))
        memory.end()
    response = text[min(cut, len(text) - 1) :]
    memory.extend(response)
    own.extend(text)
    limits = 12, 12, 12, 2.0, 1.0, 0.1
    a, b = own.draft(text, *limits), memory.draft(text, *limits)
    both = memory.draft(text, *limits, own=own)
    better = a if a.score >= b.score - 1e-9 else b
    assert (both.tokens.tolist(), both.score, both.match) == (better.tokens.tolist(), better.score, better.match)
    quick = memory.draft(text, *limits, own=own, newest=len(response))
    for part in ("tokens", "parents", "kinds", "probability", "score", "match"):
        assert np.array_equal(getattr(both, part), getattr(quick, part))


def test_a_repeated_session_is_three_times_quicker_once_warm_and_only_in_its_namespace():
    drafter, texts = SuffixDrafter(), [agent_text(seed) for seed in range(3)]
    cold = [play(drafter, text, 50, namespace="a") for text in texts]
    warm = [play(drafter, text, 50, namespace="a") for text in texts]
    assert sum(cold) >= 3 * sum(warm)
    assert [play(drafter, text, 50, namespace="b", finish=False) for text in texts] == cold
    fresh, other = draft(SuffixDrafter(), texts[0][:100], namespace="c"), draft(drafter, texts[0][:100], namespace="c")
    assert fresh.tokens.tolist() == other.tokens.tolist()
    assert fresh.probability.tolist() == other.probability.tolist()


def test_the_response_is_remembered_and_the_prompt_is_not():
    drafter = SuffixDrafter()
    play(drafter, list(range(100, 160)), 30)
    assert len(draft(drafter, [110, 111, 112])) == 1
    assert draft(drafter, [140, 141, 142]).tokens.tolist() == [142, 143, 144]


def test_a_response_serves_others_while_it_is_written():
    drafter, context = SuffixDrafter(), Context([1])
    drafter.draft([context], [NOTHING])
    extend(context, range(100, 120))
    drafter.draft([context], [NOTHING])
    assert draft(drafter, [104, 105, 106]).tokens.tolist() == [106, 107, 108]


def test_responses_written_at_once_are_remembered_each_in_order():
    drafter = SuffixDrafter()
    contexts = [Context([i]) for i in range(3)]
    texts = [np.arange(1000 * i, 1000 * i + 50) for i in range(1, 4)]
    for start in range(0, 50, 5):
        drafter.draft(contexts, [BUDGET] * 3)
        for context, text in zip(contexts, texts, strict=True):
            extend(context, text[start : start + 5])
    for i in (1, 0, 2):
        contexts[i].finished = True
        drafter.draft([contexts[i]], [NOTHING])
    tokens, _, _ = drafter._memories[""].content()
    assert sorted(tokens[tokens >= 0].tolist()) == sorted(np.concatenate(texts).tolist())
    for text in texts[1:]:
        assert " ".join(map(str, text)) in " ".join(map(str, tokens))
    drafter.learn([5, 6, 7])  # nothing is left half open
    assert drafter._memories[""].content()[0].tolist()[-4:] == [5, 6, 7, -1]


def turn(drafter, text, prompt, namespace=""):
    """What is drafted, step by step, while ``text`` is decoded from its ``prompt`` first tokens on."""
    context, drafts = Context(text[:prompt], namespace), []
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [BUDGET])
        drafts.append((tree.tokens.tolist(), tree.parents.tolist()))
        extend(context, text[len(context.tokens) :][:3])
    context.finished = True
    drafter.draft([context], [NOTHING])
    return drafts


def test_a_conversation_goes_on_in_the_tree_of_its_last_turn():
    rng, turns = np.random.default_rng(0), range(40, 400, 40)
    text = rng.integers(0, 6, 400)
    one, anew = SuffixDrafter(), SuffixDrafter()
    for stop in turns:
        drafts = turn(one, text[:stop], stop - 20)
        anew._memories[""]._kept.clear()
        assert drafts == turn(anew, text[:stop], stop - 20)
    [kept] = one._memories[""]._kept
    assert kept.tree.tokens.tolist() == text[: turns[-1]].tolist()
    turn(one, [*text[:100], 9], 50)  # another branch, of which nothing kept is the beginning
    turn(one, text, 370, namespace="b")
    assert [len(each.tree.tokens) for each in one._memories[""]._kept] == [turns[-1], 101]
    assert one._memories[""].resume(text[:5]) is None
    assert one._memories[""].resume(text) is kept
    assert one._memories[""].resume(text) is None  # it is taken


def test_the_trees_kept_for_conversations_are_bounded():
    drafter, rng = SuffixDrafter(max_bytes=1 << 20), np.random.default_rng(0)
    for _ in range(20):
        turn(drafter, rng.integers(0, 1000, 500), 100)
        kept = drafter._memories[""]._kept
        assert 1 <= len(kept) <= KEPT
        assert sum(text.bytes_used for text in kept) <= 1 << 17
    held = drafter.bytes_used
    turn(drafter, rng.integers(0, 1000, 5000), 100)  # larger than may be kept
    assert not kept
    drafter.reset()
    assert held > drafter.bytes_used == 0


def test_a_text_given_up_does_not_block_the_next():
    drafter = SuffixDrafter()
    play(drafter, list(range(100, 130)), 10, finish=False)
    gc.collect()
    play(drafter, list(range(200, 230)), 10, finish=False)
    assert draft(drafter, [215, 216]).tokens.tolist() == [216, 217]
    assert draft(drafter, [115, 116]).tokens.tolist() == [116, 117]


def test_only_so_many_responses_are_kept_and_namespaces_too():
    drafter = SuffixDrafter(max_sequences=2, namespaces=2)
    for first in (100, 200, 300):
        drafter.learn(range(first, first + 20))
    assert [len(draft(drafter, [first + 5, first + 6])) for first in (100, 200, 300)] == [1, 2, 2]
    for namespace in ("x", "y"):
        drafter.learn([1, 2, 3], namespace)
    assert len(draft(drafter, [205, 206])) == 1


def test_memory_is_bounded_and_dies_with_its_context():
    drafter, rng = SuffixDrafter(max_bytes=1 << 18), np.random.default_rng(0)
    for _ in range(60):
        drafter.learn(rng.integers(0, 1000, 500))
    assert drafter.bytes_used <= (1 << 18) + (1 << 14)
    held, context = drafter.bytes_used, Context(rng.integers(0, 1000, 2000))
    drafter.draft([context], [BUDGET])
    assert drafter.bytes_used > held + 50_000
    del context
    gc.collect()
    assert drafter.bytes_used == held


def test_what_comes_true_is_trusted_and_what_does_not_is_not():
    told, lied = SuffixDrafter(), SuffixDrafter()
    for start in range(1000, 3000, 100):
        groups = np.arange(start, start + 96).reshape(6, 16)
        play(told, [*groups.ravel(), *groups[::-1].ravel()], 96)
        groups = groups.reshape(24, 4)  # after three tokens that came before comes another than before
        play(lied, [*groups.ravel(), *np.where(groups % 4 == 3, groups + 5000, groups)[::-1].ravel()], 96)
    text = [1, 5, 6, 3000, 5, 6]
    assert draft(told, text).probability[1] > 0.6 > 0.1 > draft(lied, text).probability[1]
    assert draft(SuffixDrafter(), text).probability[1] == pytest.approx(prior()[draft_kind(text)])


def draft_kind(text):
    tree = SuffixTree()
    tree.extend(np.array(text))
    return SuffixTree().draft(np.array(text), 8, 8, 8, own=tree).kinds[1]


def test_the_fallback_drafts_where_the_score_is_low():
    fallback = Fixed()
    drafter = SuffixDrafter(fallback=fallback, threshold=2.0)
    assert (drafter.topk, drafter.hidden) == (3, True)
    drafter.learn(range(100, 200))
    sure, unsure = Context(range(100, 120)), Context([1, 2, 1, 2])
    a, b = drafter.draft([sure, unsure], [BUDGET, BUDGET])
    assert a.tokens.tolist() == list(range(119, 139))
    assert set(a.source) == {"suffix"}
    assert (b.tokens.tolist(), b.source[1]) == ([2, 7], "fixed")
    assert fallback.budgets == [NOTHING, BUDGET]
    silent = SuffixDrafter(fallback=SuffixDrafter())
    assert draft(silent, [1, 2, 1, 2]).tokens.tolist() == draft(SuffixDrafter(), [1, 2, 1, 2]).tokens.tolist()


def test_what_was_learnt_is_saved_and_loaded(tmp_path):
    drafter, file = SuffixDrafter(), tmp_path / "suffix"
    for seed in range(3):
        play(drafter, agent_text(seed, 200), 20, namespace="a")
    drafter.learn([1, 2, 3], "b")
    drafter.save(file)
    loaded = SuffixDrafter()
    loaded.learn([7, 8, 9], "c")
    loaded.load(file)
    for namespace, text in (("a", agent_text(1, 100)), ("b", [1, 2]), ("c", [7, 8])):
        one, other = draft(drafter, text, namespace=namespace), draft(loaded, text, namespace=namespace)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.probability.tolist() == other.probability.tolist()
    few = SuffixDrafter(max_sequences=1, max_depth=8)
    few.load(file)
    assert [len(draft(few, agent_text(seed, 100), namespace="a")) > 1 for seed in range(3)] == [False, False, True]


def test_a_damaged_file_is_refused_and_nothing_is_lost(tmp_path):
    drafter, file = SuffixDrafter(), tmp_path / "suffix"
    drafter.learn([1, 2, 3, 4])
    drafter.save(file)
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:50], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="suffix"):
            drafter.load(file)
    with pytest.raises(FileNotFoundError):
        drafter.load(tmp_path / "none")
    assert draft(drafter, [2, 3]).tokens.tolist() == [3, 4]
    file.write_bytes(whole)
    drafter.reset()
    assert len(draft(drafter, [2, 3])) == 1
    drafter.load(file)
    assert draft(drafter, [2, 3]).tokens.tolist() == [3, 4]
    drafter.reset("")
    assert len(draft(drafter, [2, 3])) == 1


GOOD = {"tokens.0": np.array([1, -1], np.int32), "accepted.0": np.ones(KINDS), "offered.0": np.full(KINDS, 2.0)}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("tokens.0", np.array([1, -2], np.int32)),
        ("tokens.0", np.array([1, -1], np.int64)),
        ("accepted.0", np.full(KINDS, 3.0)),
        ("accepted.0", np.full(KINDS, np.nan)),
        ("offered.0", np.ones(3)),
        ("more", np.ones(3)),
    ],
)
def test_a_file_that_could_not_have_been_written_is_refused(tmp_path, name, array):
    storage.write(tmp_path / "f", suffix_file.KIND, suffix_file.VERSION, GOOD, {"namespaces": [""]})
    SuffixDrafter().load(tmp_path / "f")
    storage.write(tmp_path / "f", suffix_file.KIND, suffix_file.VERSION, GOOD | {name: array}, {"namespaces": [""]})
    with pytest.raises(ValueError, match="f"):
        SuffixDrafter().load(tmp_path / "f")


def test_threads_share_a_drafter():
    drafter, faults = SuffixDrafter(max_bytes=1 << 18), []

    def work(seed):
        try:
            for i in range(8):
                play(drafter, agent_text((seed, i) if i % 2 else 0, 300), 20)
        except Exception as fault:
            faults.append(fault)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert faults == []
    assert drafter._memories[""]._tree.sequences >= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_depth": 1},
        {"factor": -1.0},
        {"offset": float("inf")},
        {"min_probability": 1.5},
        {"mode": "chain"},
        {"max_bytes": 1000},
        {"max_sequences": -1},
        {"namespaces": 0},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SuffixDrafter(**arguments)


@pytest.mark.parametrize("tokens", [[[1, 2]], [1, -1], [1.5], [2**31]])
def test_a_bad_response_is_refused(tokens):
    with pytest.raises(ValueError, match="token ids"):
        SuffixDrafter().learn(tokens)


def test_as_many_tokens_per_step_as_the_cache_of_arctic_inference():
    pytest.importorskip("arctic_inference.suffix_decoding", reason="arctic-inference is not installed")
    import suffix_cache as bench

    rng = np.random.default_rng(0)
    phrases = [rng.integers(0, 500, rng.integers(2, 30)) for _ in range(60)]
    texts = [np.concatenate([phrases[i] for i in rng.zipf(1.5, 40) % 60]).astype(np.int32) for _ in range(30)]
    turns = [(text[:100], text[100:]) for text in texts]
    who = dict(bench.players(32))
    ours, tree, theirs = (bench.replay(who[name](), turns) for name in ("path", "tree", "arctic path"))
    assert ours.steps <= 1.01 * theirs.steps  # ties are broken in another order
    assert tree.steps <= 1.01 * ours.steps
    assert ours.memory <= 2 * theirs.memory
