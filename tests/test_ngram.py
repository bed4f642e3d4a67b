"""NgramDrafter: the longest recent match, found without rescanning, copied into a tree, and learnt from."""

import gc
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import NgramDrafter, ngram, ngram_numba

CHAIN = Budget(nodes=8, depth=8, width=8)


def play(drafter, text, prompt, budget):
    """Decode ``text`` from its ``prompt`` first tokens on, each step checked; the context and the drafted trees."""
    context, drafted = Context(text[:prompt]), []
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [budget])
        assert_within(tree, context, budget)
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        context.extend(Verdict(tree, path, truth[: len(path)]))
        drafted.append(tree)
    return context, drafted


def assert_within(tree, context, budget):
    last, limits = int(context.tokens[-1]), (budget.nodes, budget.depth, budget.width)
    assert trees.fault(tree.tokens, tree.parents, tree.probability, last, 2**62, *limits) is None
    assert len(tree.source) == len(tree)
    assert tree.law is None
    assert (tree.probability[1:] >= budget.least).all()


def draft(drafter, text, budget=CHAIN):
    return drafter.draft([Context(text)], [budget])[0]


def longest_recent_match(text, max_match, min_match, visits):
    """Where the n-gram looked up ended before, by brute force: longest n, longest match, latest."""
    last = len(text) - 1
    for n in range(min(max_match, len(text)), min_match - 1, -1):
        ends = [end for end in range(n - 1, last) if text[end - n + 1 : end + 1] == text[last - n + 1 :]]
        if ends and n < max_match:
            return ends[-1]
        if ends:
            return max(ends[-visits:], key=lambda end: (common_suffix(text, end), end))
    return None


def common_suffix(text, end):
    n = 0
    while n < ngram_numba.LONGEST and n <= end and text[end - n] == text[len(text) - 1 - n]:
        n += 1
    return n


def copied(text, end, depth):
    grown = list(text)
    for i in range(depth):
        grown.append(grown[end + 1 + i])
    return grown[len(text) :]


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    cuts=st.lists(st.integers(1, 200), max_size=4),
    max_match=st.integers(1, 5),
    shorter=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_a_chain_copies_what_followed_the_longest_recent_match(text, cuts, max_match, shorter):
    min_match = max(1, max_match - shorter)
    drafter = NgramDrafter(max_match, min_match, branches=1)
    context = Context(text[: min([*cuts, len(text)])])
    for cut in sorted({*cuts, len(text)}):  # the text arrives in pieces; what is found must not depend on them
        piece = np.array(text[len(context.tokens) : cut], np.int64)
        context.extend(Verdict(DraftTree.root(int(context.tokens[-1])), np.zeros(1, np.int64), piece))
        [tree] = drafter.draft([context], [CHAIN])
    end = longest_recent_match(text, max_match, min_match, ngram_numba.VISITS)
    assert tree.tokens[1:].tolist() == ([] if end is None else copied(text, end, CHAIN.depth))
    assert trees.is_chain(tree.parents)


@given(st.lists(st.integers(0, 2), min_size=2, max_size=80), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_every_path_of_a_tree_followed_some_match(text, branches, depth):
    tree = draft(NgramDrafter(branches=branches), text, Budget(64, depth, 8))
    continuations = [copied(text, end, depth) for end in range(len(text) - 1) if text[end] == text[-1]]
    assert (len(tree) > 1) == bool(continuations)
    for node in range(1, len(tree)):
        path = []
        while node > 0:
            path, node = [int(tree.tokens[node]), *path], tree.parents[node]
        assert any(path == continuation[: len(path)] for continuation in continuations)


def test_the_most_recent_of_equal_matches_comes_first_and_others_branch_off():
    text = [1, 2, 3, 9, 1, 2, 4, 9, 1, 2]
    assert draft(NgramDrafter(branches=1), text).tokens[1:3].tolist() == [4, 9]
    tree = draft(NgramDrafter(branches=2), text)
    assert tree.tokens[tree.parents == 0].tolist() == [4, 3]
    assert tree.probability[1] > tree.probability[tree.tokens == 3]


def test_a_longer_older_match_beats_a_shorter_recent_one():
    text = [5, 1, 2, 3, 7, 8, 9, 2, 3, 6, 1, 2, 3]
    assert draft(NgramDrafter(branches=1), text).tokens[1] == 7
    assert draft(NgramDrafter(max_match=1, branches=1), text).tokens[1] == 7  # told apart by measuring the match
    assert len(draft(NgramDrafter(min_match=4, branches=1), text)) == 1


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_text_that_loops_is_drafted_to_full_depth(period):
    loop = list(range(10, 10 + period))
    text = [1, 2, 3, *loop, *loop]
    tree = draft(NgramDrafter(branches=1), text, Budget(20, 20, 1))
    assert tree.tokens[1:].tolist() == (loop * 20)[:20]


def test_nothing_is_guessed_where_nothing_matches_or_nothing_is_asked():
    drafter = NgramDrafter()
    assert len(draft(drafter, [1, 2, 3])) == 1
    assert len(draft(drafter, [7])) == 1
    for budget in (Budget(0, 0, 0), Budget(4, 0, 4), Budget(4, 4, 0)):
        assert len(draft(drafter, [1, 1, 1], budget)) == 1


def test_each_token_is_indexed_once():
    drafter, text = NgramDrafter(), np.random.default_rng(0).integers(0, 50, 700)
    context, _ = play(drafter, text, 300, CHAIN)
    drafter.draft([context], [CHAIN])
    links = context.scratch[drafter]._previous[:, :699]
    for n, row in enumerate(links, 1):  # a position entered twice would be linked to itself
        grams = [tuple(text[end - n + 1 : end + 1]) for end in range(n - 1, 699)]
        last = dict[tuple[int, ...], int]()
        for end, gram in enumerate(grams, n - 1):
            assert row[end] == last.get(gram, ngram_numba.EMPTY)
            last[gram] = end


def test_calls_may_skip_steps():
    text = np.random.default_rng(1).integers(0, 5, 400)
    drafter, late = NgramDrafter(), NgramDrafter()
    context, _ = play(drafter, text, 50, CHAIN)
    [tree] = drafter.draft([context], [CHAIN])
    [other] = late.draft([context], [CHAIN])
    assert {*tree.tokens[tree.parents == 0].tolist()} == {*other.tokens[other.parents == 0].tolist()}


def test_repetitive_text_takes_few_steps():
    rng = np.random.default_rng(2)
    phrases = [rng.integers(0, 1000, 12) for _ in range(5)]
    text = np.concatenate([phrases[i] for i in rng.integers(0, 5, 40)])
    context, _ = play(NgramDrafter(), text, 120, Budget(16, 8, 4))
    assert (len(text) - 120) / context.steps > 4


def test_random_text_is_learnt_to_be_hopeless_and_a_copy_to_be_sure():
    rng = np.random.default_rng(3)
    hopeless, copy = NgramDrafter(), NgramDrafter()
    noise, passage = rng.integers(0, 8, 900), rng.integers(0, 10_000, 300)
    _, drafted = play(hopeless, noise, 100, CHAIN)
    first = np.mean([tree.probability[1] for tree in drafted[-100:]])
    fresh = np.mean([draft(NgramDrafter(), noise[:end]).probability[1] for end in range(800, 900)])
    assert first == pytest.approx(1 / 8, abs=0.04)
    assert fresh > 0.2
    play(copy, np.concatenate([passage, passage]), 300, CHAIN)
    long = [*range(100, 140), 5, *range(100, 140)]
    assert draft(NgramDrafter(), long).probability[8] < draft(copy, long).probability[8]


def test_probabilities_come_true():
    rng = np.random.default_rng(4)
    follows = rng.integers(0, 30, (30, 3))
    text = [0]
    for choice in rng.choice(3, 3000, p=[0.6, 0.3, 0.1]):
        text.append(int(follows[text[-1], choice]))
    context, drafted = play(NgramDrafter(), text, 200, Budget(16, 6, 4))
    promised = sum(float(tree.probability[1:].sum()) for tree in drafted[100:])
    kept = [len(tree_path(tree, text, position)) for tree, position in positions(drafted, 200, text)[100:]]
    assert promised == pytest.approx(sum(kept), rel=0.15)
    assert context.steps == len(drafted)


def positions(drafted, start, text):
    pairs = []
    for tree in drafted:
        pairs.append((tree, start))
        start += len(tree_path(tree, text, start)) + 1
    return pairs


def tree_path(tree, text, position):
    return trees.follow(tree.tokens, tree.parents, np.asarray(text[position:-1]))[1:]


def test_counts_stay_bounded():
    drafter = NgramDrafter()
    play(drafter, np.tile(np.arange(7), 900), 20, CHAIN)
    assert drafter._acceptance.offered.max() <= 1025


def test_memory_is_linear_in_the_text_and_goes_with_the_context():
    drafter = NgramDrafter()
    empty = drafter.bytes_used
    context = Context(np.random.default_rng(5).integers(0, 1000, 4096))
    drafter.draft([context], [CHAIN])
    assert 40 * 4096 <= drafter.bytes_used - empty <= 100 * 4096
    context.finished = True
    assert len(drafter.draft([context], [Budget(0, 0, 0)])[0]) == 1
    assert not context.scratch
    gc.collect()
    assert drafter.bytes_used == drafter.max_bytes == empty


def test_contexts_are_independent_and_two_runs_are_alike():
    rng = np.random.default_rng(6)
    texts = [rng.integers(0, 6, 300), rng.integers(0, 6, 300)]
    together = NgramDrafter().draft([Context(text) for text in texts], [CHAIN, CHAIN])
    for text, tree in zip(texts, together, strict=True):
        alone = draft(NgramDrafter(), text)
        assert np.array_equal(alone.tokens, tree.tokens)
        assert np.array_equal(alone.parents, tree.parents)
    first, second = (play(NgramDrafter(), texts[0], 30, CHAIN)[1] for _ in range(2))
    assert all(np.array_equal(a.probability, b.probability) for a, b in zip(first, second, strict=True))


def test_the_least_probability_is_kept_to():
    text = np.random.default_rng(7).integers(0, 4, 200)
    _, drafted = play(NgramDrafter(), text, 50, Budget(16, 8, 4, least=0.2))
    assert any(len(tree) > 1 for tree in drafted)


@pytest.mark.parametrize("arguments", [{"max_match": 0}, {"min_match": 0}, {"min_match": 5}, {"branches": 0}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"min_match|branches"):
        NgramDrafter(**arguments)


def test_the_prior_is_a_probability_that_rises_with_match_and_votes():
    rates = ngram.prior().reshape(8, 4, 4, 2)[1:, 1:]
    assert ((rates > 0) & (rates < 1)).all()
    assert (np.diff(rates, axis=0) > 0).all()
    assert (np.diff(rates, axis=1) > 0).all()
    assert (np.diff(rates, axis=2) < 0).all()


def test_importing_the_drafters_loads_no_compiler():
    program = "import sys, specdec.drafters; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
