"""SuffixTree: its counts, order and drafts against a dictionary of n-grams, through appends, ends and forgetting."""

import heapq
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.calibration import Acceptance
from specdec.drafters import suffix_tree_numba as kernels
from specdec.drafters.generations import Generations
from specdec.drafters.suffix import prior
from specdec.drafters.suffix_tree import NO_DRAFT, SuffixTree

TOKENS = st.integers(0, 3)
PIECES = st.lists(TOKENS, max_size=25)
STEPS = st.lists(st.one_of(PIECES, st.just("end"), st.just("forget")), max_size=16)
RULES = st.tuples(  # factor, offset, least, nodes, depth, width
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([-1.0, 0.0, 1.0, 3.0]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.integers(0, 12),
    st.integers(1, 8),
    st.sampled_from([1, 2, 8]),
)


def play(tree, steps):
    """Do the steps to a tree and to lists; the lists."""
    sequences = [[]]
    for step in steps:
        if step == "end" and sequences[-1]:
            tree.end()
            sequences.append([])
        elif step == "forget" and len(sequences) > 1:
            tree.forget()
            sequences.pop(0)
        elif isinstance(step, list):
            tree.extend(np.array(step, np.int64))
            sequences[-1] += step
    return sequences


def split(stream):
    """The sequences of ``tree.tokens``."""
    return [list(group) for known, group in itertools.groupby(stream.tolist(), lambda token: token >= 0) if known]


def ngrams(sequences, max_depth):
    """How often each n-gram occurs, the empty one at every start."""
    counts = Counter()
    for sequence in sequences:
        for start in range(len(sequence)):
            counts.update(
                tuple(sequence[start:stop]) for stop in range(start, min(start + max_depth, len(sequence)) + 1)
            )
    return counts


def followers(counts, gram, max_depth):
    return {gram[-1]: n for gram, n in continued(counts, gram, max_depth)}


def continued(counts, gram, max_depth):
    grams = ((*gram, token) for token in range(4)) if len(gram) < max_depth else ()
    return [(longer, counts[longer]) for longer in grams if counts[longer]]


def expected_draft(tree, counts, context, rule):
    """The published rule over a dictionary; only the order among equal counts is asked of the tree."""
    factor, offset, least, nodes, depth, width = rule
    best = ([], [], [], 0.0)
    for n in range(1, min(len(context), tree.max_depth + 1)):
        pattern = tuple(context[len(context) - n :])
        if not counts[pattern]:
            break
        most = min(nodes, int(np.floor(n * factor + offset + 1e-6)))
        guess = best_first(tree, counts, pattern, (most, depth, width, least))
        if guess[3] >= best[3] - 1e-9:
            best = guess
    return best


def best_first(tree, counts, pattern, limits):
    most, depth, width, least = limits
    serial, offers, guesses = itertools.count(), [], ([], [], [])

    def offer(gram, parent, path):
        order = tree.followers(np.array(gram, np.int64)) if len(gram) < tree.max_depth else []
        assert dict(order) == followers(counts, gram, tree.max_depth)
        assert [n for _, n in order] == sorted((n for _, n in order), reverse=True)
        for token, n in order[: min(width, max(most, 0))]:
            odds = path if n == counts[gram] else path * n / counts[gram]
            if odds >= least:
                heapq.heappush(offers, (-odds, next(serial), (*gram, token), parent))

    offer(pattern, 0, 1.0)
    while offers and len(guesses[0]) < most:
        odds, _, gram, parent = heapq.heappop(offers)
        for column, value in zip(guesses, (gram[-1], parent, -odds), strict=True):
            column.append(value)
        if len(gram) - len(pattern) < depth:
            offer(gram, len(guesses[0]), -odds)
    return *guesses, sum(guesses[2])


def assert_drafts(tree, counts, context, rule):
    factor, offset, least, nodes, depth, width = rule
    tokens, parents, paths, score = expected_draft(tree, counts, context, rule)
    draft = tree.draft(np.array(context), nodes, depth, width, factor, offset, least)
    assert draft.tokens.tolist() == [context[-1], *tokens]
    assert draft.parents.tolist() == [-1, *parents]
    np.testing.assert_array_equal(draft.probability, np.array([1, *paths], np.float32))
    assert draft.score == pytest.approx(score, abs=1e-12)


def assert_counts(tree, counts):
    for gram, n in counts.items():
        if gram:
            assert tree.count(np.array(gram)) == n, gram


def assert_sound(tree):
    """Every node is reached once, labels agree with the store, siblings stand in runs, all children are found."""
    nodes, runs, table, state = tree.arrays.nodes, tree.arrays.runs, tree.arrays.table, tree.arrays.state
    reached, waiting, listed, used_runs = 0, [kernels.ROOT], [], []
    while waiting:
        parent, reached = waiting.pop(), reached + 1
        children, child = [], nodes[parent, kernels.HEAD]
        while child != kernels.NONE:
            assert nodes[child, kernels.PARENT] == parent
            assert nodes[child, kernels.PREVIOUS] == (children[-1] if children else kernels.NONE)
            assert nodes[child, kernels.START] >= state[kernels.OLDEST]
            assert nodes[child, kernels.TOKEN] == tree.arrays.tokens[nodes[child, kernels.START]]
            assert parent == kernels.ROOT or nodes[child, kernels.COUNT] < nodes[parent, kernels.COUNT]
            children.append(child)
            child = nodes[child, kernels.NEXT]
        assert nodes[parent, kernels.TAIL] == (children[-1] if children else kernels.NONE)
        if len(children) > 1:
            listed += children
            for count, group in itertools.groupby(children, lambda child: nodes[child, kernels.COUNT]):
                members = list(group)
                assert len({nodes[child, kernels.RUN] for child in members}) == 1, count
                used_runs.append(nodes[members[0], kernels.RUN])
                assert runs[used_runs[-1]].tolist() == [members[0], members[-1]]
        for child in children:
            assert kernels._child(nodes, table, parent, nodes[child, kernels.TOKEN]) == child
        waiting += children
    assert sorted(table[table[:, kernels.CHILD] != kernels.NONE, kernels.CHILD].tolist()) == sorted(listed)
    assert reached == state[kernels.LIVE] <= 2 * (state[kernels.SIZE] - state[kernels.OLDEST]) + 1
    assert len(set(used_runs)) == len(used_runs)


@given(steps=STEPS, depth=st.sampled_from([2, 3, 5, 8, 64]), contexts=st.lists(PIECES, max_size=10), rule=RULES)
@settings(max_examples=300, deadline=None)
def test_counts_and_drafts_are_those_of_a_dictionary_of_ngrams(steps, depth, contexts, rule):
    tree = SuffixTree(depth)
    sequences = play(tree, steps)
    assert split(tree.tokens) == [sequence for sequence in sequences if sequence]
    assert tree.sequences == len(sequences) - 1
    assert_sound(tree)
    counts = ngrams(sequences, depth)
    assert_counts(tree, counts)
    rng = np.random.default_rng(0)
    for context in contexts:
        if context:
            assert tree.count(np.array(context[:depth])) == counts[tuple(context[:depth])]
    # 40 more contexts that do occur, whole or with a strange beginning: 300 * 40 > 10,000 drafts in all
    texts = [sequence for sequence in [*sequences, *contexts] if sequence]
    for _ in range(40 if texts else 0):
        text = texts[rng.integers(len(texts))]
        assert_drafts(tree, counts, text[: rng.integers(1, len(text) + 1)], rule)


@given(steps=st.lists(st.one_of(PIECES, st.just("end")), max_size=16), depth=st.sampled_from([2, 3, 8]))
@settings(max_examples=100, deadline=None)
def test_of_equal_counts_the_last_to_recur_comes_first_and_of_single_ones_the_first(steps, depth):
    tree = SuffixTree(depth)
    sequences = play(tree, steps)
    seen = {}  # by n-gram, the place of its last token's last occurrence
    for place, (sequence, stop) in enumerate((s, stop) for s in sequences for stop in range(1, len(s) + 1)):
        for start in range(max(0, stop - depth), stop):
            seen[tuple(sequence[start:stop])] = place
    counts = ngrams(sequences, depth)
    for gram in {gram[:-1] for gram in seen}:
        known = [(token, n) for token in range(4) if (n := counts[(*gram, token)])]
        places = {token: seen[(*gram, token)] * (1 if n > 1 else -1) for token, n in known}
        expected = sorted(known, key=lambda each: (each[1], places[each[0]]), reverse=True)
        assert tree.followers(np.array(gram, np.int64)) == expected


@given(steps=st.lists(st.sampled_from(["end", "forget", *range(1, 300)]), max_size=80), vocabulary=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_of_two_generations_the_old_one_goes_whole(steps, vocabulary):
    rng, both, stream, before = np.random.default_rng(0), Generations(4, 8192), [], 0
    for step in steps:
        if step == "end":
            both.end()
            stream += [-1] if stream and stream[-1] >= 0 else []
        elif step == "forget":
            both.forget()
        else:
            new = rng.integers(0, vocabulary, step)
            both.extend(new)
            stream += new.tolist()
        held = both.tokens.tolist()
        assert held == stream[len(stream) - len(held) :]  # the newest, in order
        assert both.sequences == held.count(-1)
        assert both.bytes_used <= 8192
        if step not in ("end", "forget"):
            assert len(held) >= min(before + step, 30)
        before = len(held)
    for tree in (both.old, both.young):
        assert_sound(tree)
        assert_counts(tree, ngrams(split(tree.tokens), 4))


@given(texts=st.lists(PIECES, min_size=1, max_size=6), young=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_the_best_draft_of_all_trees_wins_and_of_equals_the_own_then_the_young_one(texts, young):
    both, own, text = Generations(8, 1 << 20), SuffixTree(8), np.array([1, *texts[-1]])
    for i, other in enumerate(texts[:-1]):
        if i == young:
            both.young, both.old = both.old, both.young
        both.extend(np.array(other, np.int64))
        both.end()
    limits = 12, 12, 12, 2.0, 1.0, 0.1
    got = both.advance(own, Acceptance(prior(), 4.0), NO_DRAFT, text, 0, False, limits)
    drafts = [tree.draft(text, *limits) for tree in (own, both.young, both.old)]
    best = max(drafts, key=lambda draft: round(draft.score, 6))
    assert (got.tokens.tolist(), got.match) == (best.tokens.tolist(), best.match)
    assert got.score == pytest.approx(best.score)


def test_the_example_of_the_reference():
    tree = SuffixTree()
    tree.extend(np.array([1, 2, 1, 2, 3]))
    tree.end()
    draft = tree.draft(np.array([9, 1, 2]), 64, 64, 1)
    assert (draft.tokens.tolist(), draft.probability.tolist()) == ([2, 1, 2], [1, 0.5, 0.5])
    assert (draft.score, draft.match) == (1.0, 2)
    draft = tree.draft(np.array([1, 2]), 64, 64, 1)  # the whole context is no pattern
    assert (draft.tokens.tolist(), draft.match) == ([2, 1], 1)
    draft = tree.draft(np.array([9, 1, 2]), 64, 64, 8, offset=1.0)
    assert draft.score == 1.5
    assert sorted(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True)) == [(-1, 2), (0, 1), (0, 3), (1, 2)]
    draft = tree.draft(np.array([9, 1, 2]), 64, 64, 1, factor=4.0)
    assert (draft.tokens.tolist(), draft.score) == ([2, 1, 2, 3], 1.5)


@pytest.mark.parametrize(("factor", "drafted"), [(1.0, 32), (4.0, 51)])
@pytest.mark.parametrize("width", [1, 8])
def test_depth_bounds_match_and_continuation_of_a_periodic_text(factor, drafted, width):
    text = np.tile(np.arange(100), 6)
    tree = SuffixTree()
    tree.extend(text)
    draft = tree.draft(text, 1000, 1000, width, factor)
    assert draft.tokens[1:].tolist() == list(range(drafted))


def test_nothing_is_drafted_past_the_end_of_a_sequence():
    tree = SuffixTree()
    for text in ([5, 6, 7], [7, 8, 9]):
        tree.extend(np.array(text))
        tree.end()
    assert tree.draft(np.array([5, 6]), 9, 9, 9, offset=9.0).tokens.tolist() == [6, 7]
    assert tree.followers(np.array([6, 7])) == []
    assert tree.draft(np.array([1, 9]), 9, 9, 9, offset=9.0).tokens.tolist() == [9]


def test_an_ended_sequence_is_another_than_the_next():
    tree = SuffixTree()
    tree.end()
    assert tree.sequences == 0
    for _ in range(3):
        tree.extend(np.array([1, 2]))
        tree.end()
        tree.end()
    assert tree.sequences == 3
    assert tree.tokens.tolist() == [1, 2, -1] * 3
    assert tree.count(np.array([1, 2])) == 3
    assert tree.count(np.array([2, 1])) == 0
    for left in (2, 1, 0, 0):
        tree.forget()
        assert (tree.sequences, tree.count(np.array([1, 2]))) == (left, left)
    assert tree.arrays.state[kernels.LIVE] == 1


def test_memory_of_what_was_forgotten_is_used_again():
    tree, rng = SuffixTree(), np.random.default_rng(0)
    sizes = []
    for _ in range(200):
        tree.extend(rng.integers(0, 50, 300))
        tree.end()
        if tree.sequences > 5:
            tree.forget()
        sizes.append(tree.bytes_used)
    assert sizes[-1] == sizes[20]


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [None, 64 << 20])
def test_memory_per_token_is_flat_over_ten_million_tokens(max_bytes):
    rng, per_token = np.random.default_rng(0), []
    tree = SuffixTree() if max_bytes is None else Generations(64, max_bytes)
    ranks = np.minimum(rng.zipf(1.3, 10_000_000) - 1, 49_151)
    for million in range(10):
        for start in range(million * 10**6, (million + 1) * 10**6, 1000):
            tree.extend(ranks[start : start + 1000])
            tree.end()
        per_token.append(tree.bytes_used / ((million + 1) * 10**6))
    assert tree.bytes_used <= (max_bytes or 200 * 10**7)
    assert max(per_token[3:]) <= 1.6 * min(per_token[:3]) or max_bytes  # arrays grow by half


@pytest.mark.parametrize(
    "make",
    [
        lambda: SuffixTree(1),
        lambda: SuffixTree(max_bytes=1000),
        lambda: Generations(64, 65_535),
        lambda: Generations(1, 65_535),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match=r"must be at least"):
        make()
