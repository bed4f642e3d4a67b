"""Every compiled tree function says what its plain reference says, at awkward sizes."""

import numpy as np
import pytest

from specdec import trees
from specdec.trees import reference

SIZES = (1, 2, 63, 64, 65, 1000)
FORMS = ("bushy", "deep", "chain", "star")


def random_tree(form, n, seed=0):
    """(tokens, parents, probability), siblings distinct; estimates are random, also above the parent's."""
    rng = np.random.default_rng((n, seed))
    earliest = {"bushy": lambda i: 0, "deep": lambda i: max(0, i - 4), "chain": lambda i: i - 1, "star": lambda i: 0}[
        form
    ]
    latest = (lambda i: 1) if form == "star" else (lambda i: i)
    parents = np.array([-1] + [int(rng.integers(earliest(i), latest(i))) for i in range(1, n)])
    families = np.zeros(n, np.int64)
    tokens = np.zeros(n, np.int64)
    for node in range(1, n):
        tokens[node] = families[parents[node]] * 7 % 1009  # a different one for each of up to 1009 siblings
        families[parents[node]] += 1
    probability = rng.choice(np.array([0.1, 0.3, 0.5, 0.7, 0.9], np.float32), n)
    probability[0] = 1
    return tokens, parents, probability


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_shape(form, n):
    _, parents, _ = random_tree(form, n)
    for name in ("depths", "ancestor_words", "ancestor_matrix"):
        assert_same([getattr(trees, name)(parents)], [getattr(reference, name)(parents)])
    assert_same([trees.positions(parents, 17)], [reference.positions(parents, 17)])
    assert trees.is_chain(parents) is reference.is_chain(parents)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_path(form, n):
    tokens, parents, _ = random_tree(form, n)
    rng = np.random.default_rng(n)
    for node in rng.integers(0, n, 20).tolist():
        token = int(rng.choice(tokens))
        assert trees.child(tokens, parents, node, token) == reference.child(tokens, parents, node, token)
        ending = tokens[list(reference.lineage(parents, node))[::-1][1:]]
        continuation = np.append(ending, rng.choice(tokens, 3))
        assert_same([trees.follow(tokens, parents, continuation)], [reference.follow(tokens, parents, continuation)])
    choices = rng.choice(tokens, n)
    assert_same([trees.greedy_path(tokens, parents, choices)], [reference.greedy_path(tokens, parents, choices)])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_subtree(form, n):
    tokens, parents, probability = random_tree(form, n)
    for nodes, depth, width, least in ((0, 5, 5, 0.0), (16, 3, 2, 0.0), (64, 99, 99, 0.3), (2000, 2000, 2000, 0.0)):
        kept = trees.prune(parents, probability, nodes, depth, width, least)
        node = min(nodes, len(parents) - 1)
        assert_same([trees.below(parents, node)], [reference.below(parents, node)])
        assert_same([kept], [reference.prune(parents, probability, nodes, depth, width, least)])
        assert_same(
            trees.select(tokens, parents, probability, kept), reference.select(tokens, parents, probability, kept)
        )


@pytest.mark.parametrize("n", SIZES)
def test_union(n):
    some = [random_tree(form, n, seed) for seed in range(2) for form in FORMS]
    some = some if n < 1000 else some[:2]  # the reference spells every path
    assert_same(trees.merge(some), reference.merge(some))
    assert_same(trees.merge(some[:1]), [*some[0], np.zeros(n, np.int64)])


@pytest.mark.parametrize("n", SIZES)
def test_soundness(n):
    rng = np.random.default_rng(n)
    found = set()
    for _ in range(60):
        tokens, parents, probability = random_tree(FORMS[rng.integers(len(FORMS))], n, int(rng.integers(9)))
        array, value = [(tokens, 0), (tokens, 7), (tokens, 2000), (parents, 1), (probability, np.nan)][rng.integers(5)]
        if rng.random() < 0.7:
            array[rng.integers(n)] = value
        budget = (0, 1009, n - rng.integers(0, 3), rng.choice([2, 2000]), rng.choice([2, 2000]))
        sound = reference.sound(tokens, parents, probability, *map(int, budget))
        assert (trees.fault(tokens, parents, probability, *map(int, budget)) is None) == sound
        found.add(sound)
    assert found == {True, False}


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize(("depth", "width", "least"), [(1, 8, 0.0), (4, 2, 0.0), (30, 8, 1e-3), (2000, 8, 0.0)])
def test_grow_adjacency(nodes, depth, width, least):
    rng = np.random.default_rng(nodes)
    matrix = rng.integers(-3, 60, (50, 8), np.int32)  # some empty, some without a row of their own, some repeated
    by_depth = rng.choice(np.array([0.9, 0.5, 0.25, 0.125, np.nan], np.float32), (5, 8))
    arguments = matrix, by_depth, 3, nodes, depth, width, least
    assert_same(trees.grow_adjacency(*arguments), reference.grow_adjacency(*arguments))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_expand_template(form, n):
    _, parents, _ = random_tree(form, n)
    rng = np.random.default_rng(n)
    matrix, ranks = rng.integers(-2, 52, (50, 8), np.int32), rng.integers(0, 9, n)
    for root in (0, 7, 51):
        assert_same(
            trees.expand_template(matrix, parents, ranks, root), reference.expand_template(matrix, parents, ranks, root)
        )
