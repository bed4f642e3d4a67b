"""LookaheadDrafter: tries that count every n-gram, trees of two levels of frequency, memory that keeps in bounds."""

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import storage, trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import lookahead, trie_numba
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.trie import Trie
from tests import tiny

WIDE = Budget(nodes=64, depth=12, width=64)
CHAIN = Budget(nodes=8, depth=8, width=1)
BYTES = 1 << 22


def commit(context, tokens):
    context.extend(Verdict(DraftTree.root(int(context.tokens[-1])), np.zeros(1, np.int64), np.array(tokens, np.int64)))


def draft(drafter, text, budget=WIDE, namespace=""):
    [tree] = drafter.draft([Context(text, namespace)], [budget])
    assert trees.fault(tree.tokens, tree.parents, tree.probability, text[-1], 2**62, *limits(budget)) is None
    return tree


def limits(budget):
    return budget.nodes, budget.depth, budget.width


def write(drafter, tokens, namespace="", prompt=(1,)):
    """Let a sequence of that namespace write these tokens, and end."""
    context = Context(prompt, namespace)
    drafter.draft([context], [Budget(0, 0, 0)])
    commit(context, tokens)
    context.finished = True
    drafter.draft([context], [Budget(0, 0, 0)])


def paths(tree):
    """Every node's path, the root left out."""
    found = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def play(drafter, text, prompt, budget, namespace=""):
    """Decode ``text`` from its ``prompt`` first tokens on; how many steps that takes, and the trees."""
    context, drafted = Context(text[:prompt], namespace), []
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [budget])
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        context.extend(Verdict(tree, path, truth[: len(path)]))
        drafted.append((tree, len(path) - 1))
    context.finished = True
    drafter.draft([context], [Budget(0, 0, 0)])
    return drafted


def ngrams(text, longest, start=0):
    return Counter(tuple(text[i:j]) for j in range(start + 1, len(text) + 1) for i in range(max(0, j - longest), j))


def counted(forest):
    """Every n-gram of a trie with its count."""
    rows, found = forest.rows(), []
    for token, parent, _ in rows.tolist():
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found)
    return dict(zip(found, rows[:, 2].tolist(), strict=True))


def assert_sound(forest):
    """Sizes, links and buckets of a trie agree with its nodes."""
    nodes, _, state = forest.arrays
    rows = counted(forest)
    live = [i for i in range(state[trie_numba.USED]) if nodes[i, trie_numba.PARENT] != trie_numba.GONE]
    assert len(live) == len(rows) == state[trie_numba.LIVE]
    for i in live:
        parent, token = nodes[i, trie_numba.PARENT], nodes[i, trie_numba.TOKEN]
        assert trie_numba.find_child(forest.arrays, parent, token) == i
        if parent == trie_numba.FOREST:
            assert nodes[i, trie_numba.SIZE] == sum(path[0] == token for path in rows)


@given(
    text=st.lists(st.integers(0, 3), max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    longest=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_a_trie_is_a_dictionary_of_ngrams_however_the_text_arrives(text, cuts, longest):
    forest, known = Trie(longest, 10**6, BYTES), 0
    tokens = np.array(text, np.int64)
    for cut in sorted({*(min(cut, len(text)) for cut in cuts), len(text)}):
        forest.count(tokens[:cut], known)
        known = cut
    assert counted(forest) == ngrams(text, longest)
    assert_sound(forest)


def squeezed(counts, root):
    """What a squeeze of one tree leaves, by dictionary."""
    gone = {path for path, count in counts.items() if path[0] == root and count <= 1}
    kept = {path: n for path, n in counts.items() if not any(path[:i] in gone for i in range(1, len(path) + 1))}
    return {path: n // 2 if path[0] == root else n for path, n in kept.items()}


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=150), roots=st.lists(st.integers(0, 3), max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_squeeze_halves_one_tree_and_drops_what_was_seen_once(text, roots):
    forest = Trie(5, 10**6, BYTES)
    forest.count(np.array(text), 0)
    expected = ngrams(text, 5)
    for root in roots:
        node = trie_numba.find_child(forest.arrays, trie_numba.FOREST, root)
        if node != trie_numba.NONE:
            trie_numba.squeeze(forest.arrays, node)
        expected = squeezed(expected, root)
        assert counted(forest) == expected
        assert_sound(forest)


def test_a_large_tree_is_squeezed_and_others_are_not():
    forest = Trie(4, 40, BYTES)
    rng = np.random.default_rng(0)
    for _ in range(50):
        forest.count(np.array([7, *rng.integers(100, 200, 3)]), 0)
        forest.count(np.array([8, 9]), 0)
        assert_sound(forest)
    counts = counted(forest)
    assert sum(path[0] == 7 for path in counts) <= 40
    assert counts[8, 9] == 50


def test_a_full_trie_keeps_within_its_bytes_and_keeps_what_recurs():
    forest = Trie(5, 512, 100_000)
    rng, refrain = np.random.default_rng(1), np.arange(5)
    for _ in range(400):
        forest.count(rng.integers(100, 5000, 60), 0)
        forest.count(refrain, 0)
        assert forest.bytes_used <= 100_000
    assert_sound(forest)
    assert tuple(refrain) in counted(forest)
    assert len(counted(forest)) > 500


def test_what_is_squeezed_while_it_is_written_is_not_counted_further():
    forest = Trie(4, 10**6, BYTES)
    forest.count(np.array([1, 2]), 0)
    trie_numba.squeeze(forest.arrays, trie_numba.find_child(forest.arrays, trie_numba.FOREST, 1))
    forest.count(np.array([1, 2, 3]), 2)
    assert counted(forest) == {(2,): 1, (2, 3): 1, (3,): 1}


def test_rows_fill_a_trie_that_has_less_room_as_far_as_it_goes():
    forest, small = Trie(5, 512, BYTES), Trie(5, 512, 50_000)
    forest.count(np.tile(np.arange(5), 3), 0)
    small.fill(forest.rows())
    assert counted(small) == counted(forest)
    forest.count(np.random.default_rng(2).integers(0, 1000, 2000), 0)
    small.fill(forest.rows())
    assert_sound(small)
    assert small.bytes_used <= 50_000
    small.count(np.arange(100), 0)
    assert small.bytes_used <= 50_000


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0, 1]],
        [[1, -2, 1], [2, 1, 1]],
        [[1, -2, 1], [2, -1, 1]],
        [[-1, -2, 1]],
        [[1, -2, 0]],
        [[1, -2, 1], [1, -2, 1]],
        [[1, -2, 1], [2, 0, 1], [3, 1, 1]],
        [[1, -2]],
    ],
)
def test_rows_that_are_no_forest_are_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        Trie(2, 512, BYTES).fill(np.array(rows, np.int32))


def test_the_golden_tree():
    a, b, c, d, e = range(5)
    tree = draft(LookaheadDrafter(), [a, b, c, d, a, b, e, 9, a, b], Budget(64, 5, 64))
    assert {path[:5] for path in paths(tree)} >= {(c,), (c, d), (c, d, a), (c, d, a, b), (c, d, a, b, e), (e,)}
    drafter = LookaheadDrafter()
    write(drafter, [a, b, c, d, a, b, e])
    tree = draft(drafter, [9, a, b])
    assert set(paths(tree)) == {(c,), (c, d), (c, d, a), (c, d, a, b), (c, d, a, b, e), (e,)}


def follows(texts, query, depth):
    """How often each path followed the query in any of the texts."""
    counts = Counter()
    for text in texts:
        for i in range(len(text) - len(query) + 1):
            if text[i : i + len(query)] == query:
                after = text[i + len(query) : i + len(query) + depth]
                counts.update(tuple(after[: n + 1]) for n in range(len(after)))
    return counts


@given(
    others=st.lists(st.lists(st.sampled_from([0, 1, 4, 5]), max_size=40), max_size=3),
    text=st.lists(st.integers(0, 3), min_size=2, max_size=60),
    max_query=st.integers(1, 3),
    nodes=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_a_tree_is_the_paper_s_selection_by_brute_force(others, text, max_query, nodes, share):
    branch = 5
    drafter = LookaheadDrafter(branch, max_query, share)
    for other in others:
        write(drafter, other, prompt=(9,))
    tree = draft(drafter, text, Budget(nodes, branch, 64))
    for length in range(min(max_query, len(text)), 0, -1):
        query, depth = text[-length:], branch + 1 - length
        own, shared = follows([text], query, depth), follows(others, query, depth)
        if len(own | shared) + 1 >= min(branch, nodes + 1):
            break
    expected, quota = own | shared, round(share * nodes)
    got = set(paths(tree))
    assert len(got) == min(nodes, len(expected))
    assert got <= set(expected)
    if len(expected) > nodes:
        weight = {path: (1 - 1e-4) * own[path] + 1e-4 * shared[path] for path in expected}
        assert_the_heaviest(got, shared, min(quota, len(shared)))
        assert_the_heaviest(got, weight, nodes - min(quota, len(shared)))


def assert_the_heaviest(got, weight, most):
    """The ``most`` largest weights are all there; of equal ones, as many as there is room for."""
    have = sorted((weight[path] for path in got if path in weight), reverse=True)[:most]
    assert have == sorted(weight.values(), reverse=True)[:most]


def test_the_budget_is_filled_and_no_prompt_branch_is_lost_to_many_outputs():
    drafter = LookaheadDrafter(max_query=1)
    for first in range(100, 160):
        write(drafter, [5, first, first + 100])
    tree = draft(drafter, [5, 6, 7, 8, 5], Budget(30, 4, 64))
    assert (6,) in paths(tree)
    assert len(tree) == 31


def test_the_prompt_outranks_others_but_others_have_their_share():
    drafter = LookaheadDrafter(max_query=1)
    for _ in range(20):
        write(drafter, [5, 6, 7])
    text = [5, 10, 11, 5, 10, 11, 5, 12, 13, 5]
    assert set(paths(draft(drafter, text, Budget(4, 2, 8)))) == {(6,), (6, 7), (10,), (10, 11)}
    alone = LookaheadDrafter(max_query=1, shared_share=0.0)
    alone._shared = drafter._shared
    assert set(paths(draft(alone, text, Budget(2, 2, 8)))) == {(10,), (10, 11)}


def test_a_narrow_budget_is_filled_in_depth():
    text = [5, 6, 7, 8, 5, 20, 5, 21, 5, 22, 5]
    assert len(draft(LookaheadDrafter(max_query=1), text, Budget(3, 3, 1))) == 4


def test_the_newest_tokens_are_found_at_once():
    context, drafter = Context([1, 2, 3]), LookaheadDrafter()
    commit(context, [40, 41, 42, 40])
    [tree] = drafter.draft([context], [CHAIN])
    assert tree.tokens[1:3].tolist() == [41, 42]


def test_a_prompt_leaves_no_trace_and_an_output_speeds_up_its_namespace_only():
    rng = np.random.default_rng(3)
    prompt, answer = rng.integers(10, 1000, 50), rng.integers(10, 1000, 100)
    drafter = LookaheadDrafter()
    text = [*prompt, *answer]
    cold = len(play(drafter, text, 50, CHAIN, "a"))
    assert cold == 100
    assert len(play(drafter, text, 50, CHAIN, "b")) == 100
    assert len(play(drafter, text, 50, CHAIN, "a")) < 20
    assert len(draft(drafter, prompt[:2].tolist(), CHAIN, "a")) == 1
    assert len(draft(drafter, answer[:2].tolist(), CHAIN, "c")) == 1
    drafter.reset("a")
    assert len(draft(drafter, answer[:2].tolist(), CHAIN, "a")) == 1
    assert len(draft(drafter, answer[:2].tolist(), CHAIN, "b")) == 9
    drafter.reset()
    assert len(draft(drafter, answer[:2].tolist(), CHAIN, "b")) == 1


def test_a_token_never_seen_or_an_empty_budget_drafts_nothing():
    drafter = LookaheadDrafter()
    assert len(draft(drafter, [1, 2, 3])) == 1
    for budget in (Budget(0, 0, 0), Budget(4, 0, 4), Budget(4, 4, 0)):
        assert len(draft(drafter, [1, 1, 1], budget)) == 1


def test_probabilities_come_true():
    rng = np.random.default_rng(4)
    follow = rng.integers(0, 30, (30, 3))
    text = [0]
    for choice in rng.choice(3, 3000, p=[0.6, 0.3, 0.1]):
        text.append(int(follow[text[-1], choice]))
    drafted = play(LookaheadDrafter(), text, 200, Budget(16, 6, 4))[100:]
    promised = sum(float(tree.probability[1:].sum()) for tree, _ in drafted)
    assert promised == pytest.approx(sum(accepted for _, accepted in drafted), rel=0.15)
    assert all(
        (tree.probability[1:] >= 0.2).all() for tree, _ in play(LookaheadDrafter(), text, 50, Budget(16, 6, 4, 0.2))
    )


def test_bytes_keep_to_the_cap_and_contexts_give_theirs_back():
    drafter = LookaheadDrafter(max_bytes=1 << 18)
    empty, rng = drafter.bytes_used, np.random.default_rng(5)
    for i in range(30):
        write(drafter, rng.integers(0, 50_000, 400), namespace=str(i % 7))
    assert empty < drafter.bytes_used <= empty + (1 << 18)
    context = Context(rng.integers(0, 50_000, 4000))
    drafter.draft([context], [CHAIN])
    assert drafter.bytes_used <= empty + (2 << 18)
    context.finished = True
    drafter.draft([context], [Budget(0, 0, 0)])
    assert not context.scratch
    assert drafter.bytes_used <= empty + (1 << 18)


def test_what_is_saved_drafts_the_same_after_loading(tmp_path):
    rng, drafter, other = np.random.default_rng(6), LookaheadDrafter(), LookaheadDrafter()
    for name in ("a", "b"):
        play(drafter, rng.integers(0, 9, 300), 20, WIDE, name)
    drafter.save(tmp_path / "memory")
    other.load(tmp_path / "memory")
    for name in ("a", "b", "c"):
        ours, theirs = (draft(each, [70, 3, 4], WIDE, name) for each in (drafter, other))
        assert (
            dict(zip(paths(ours), ours.probability[1:], strict=True)).items()
            == dict(zip(paths(theirs), theirs.probability[1:], strict=True)).items()
        )
    assert len(draft(other, [70, 3, 4], WIDE, "a")) > 1


def test_a_file_that_is_not_right_is_refused_and_changes_nothing(tmp_path):
    drafter, file = LookaheadDrafter(), tmp_path / "memory"
    write(drafter, [5, 6, 7, 8])
    drafter.save(file)
    arrays, facts = storage.read(file, lookahead.KIND, lookahead.VERSION)
    loop = arrays["trie.0"].copy()
    loop[1, 1] = 1
    wrong = [
        (arrays | {"trie.0": loop}, facts),
        (arrays | {"trie.1": loop}, facts),
        (arrays | {"accepted": arrays["offered"] + 1}, facts),
        (arrays | {"offered": arrays["offered"][1:]}, facts),
        (arrays, facts | {"branch": 3}),
    ]
    for content in wrong:
        storage.write(file, lookahead.KIND, lookahead.VERSION, *content)
        with pytest.raises(ValueError, match=r"rows|holds|counts|branches"):
            drafter.load(file)
    drafter.save(file)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        drafter.load(file)
    with pytest.raises(FileNotFoundError):
        drafter.load(tmp_path / "none")
    assert draft(drafter, [9, 5], CHAIN).tokens[1:].tolist() == [6, 7, 8]


def test_threads_share_a_drafter():
    drafter, faults = LookaheadDrafter(max_bytes=1 << 18), []

    def work(seed):
        try:
            play(drafter, np.random.default_rng(seed).integers(0, 40, 600), 50, WIDE, str(seed % 2))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for forest in drafter._shared.items().values():
        assert_sound(forest)


@pytest.mark.parametrize(
    "arguments", [{"branch": 0}, {"max_query": 0}, {"max_query": 13}, {"shared_share": 1.1}, {"max_bytes": 1000}]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"max_query|share|max_bytes"):
        LookaheadDrafter(**arguments)


def test_generation_is_exact_and_a_repeated_answer_takes_few_steps():
    model, drafter = tiny.model(), LookaheadDrafter()
    greedy = {"input_ids": tiny.prompt(), "max_new_tokens": 40, "do_sample": False}
    cold = tiny.same(model, greedy, drafter=drafter).stats
    warm = tiny.same(model, greedy, drafter=drafter).stats
    assert warm.steps < cold.steps
    assert warm.steps < 20
    tiny.same(model, {**greedy, "do_sample": True, "temperature": 0.7}, drafter=drafter, seed=3)
