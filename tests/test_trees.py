"""What trees promise, checked on random trees against networkx and against plain enumeration."""

import subprocess
import sys
from itertools import combinations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import trees

checked = settings(deadline=None, max_examples=60)  # the first call of a compiled function takes a second


@st.composite
def drawn_trees(draw, most=40, vocab=6, root=None):
    """(tokens, parents, probability): parents first, siblings distinct, no path likelier than its parent's."""
    tokens, parents, probability, taken = (
        [draw(st.integers(0, vocab - 1)) if root is None else root],
        [-1],
        [1.0],
        set(),
    )
    for _ in range(draw(st.integers(0, most - 1))):
        parent, token = draw(st.integers(0, len(parents) - 1)), draw(st.integers(0, vocab - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            probability.append(probability[parent] * draw(st.sampled_from((1.0, 0.75, 0.5, 0.25))))
    return np.array(tokens), np.array(parents), np.array(probability, np.float32)


def path_to(parents, node):
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


def spelled(tokens, parents):
    """Each node's path as a tuple of tokens."""
    return [tuple(tokens[path_to(parents, node)].tolist()) for node in range(len(tokens))]


def valid(parents):
    return parents[0] == -1 and all(0 <= parents[i] < i for i in range(1, len(parents)))


@checked
@given(drawn_trees(most=70))
def test_mask_is_the_closure_of_parents(tree):
    tokens, parents, _ = tree
    graph = trees.to_networkx(tokens, parents)
    closure = networkx.to_numpy_array(networkx.transitive_closure(graph, reflexive=True), nodelist=range(len(tokens)))
    matrix = trees.ancestor_matrix(parents)
    assert matrix.dtype == np.bool_
    assert np.array_equal(matrix, closure.T.astype(bool))
    bits = np.unpackbits(trees.ancestor_words(parents).view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(bits[:, : len(tokens)], matrix)
    assert not bits[:, len(tokens) :].any()


@checked
@given(drawn_trees(), st.integers(0, 5000))
def test_depth_is_the_distance_from_the_root(tree, start):
    tokens, parents, _ = tree
    distance = networkx.shortest_path_length(trees.to_networkx(tokens, parents), source=0)
    assert trees.depths(parents).tolist() == [distance[node] for node in range(len(tokens))]
    assert np.array_equal(trees.positions(parents, start), trees.depths(parents) + start)
    assert trees.is_chain(parents) == (max(distance.values()) == len(tokens) - 1)


@checked
@given(drawn_trees())
def test_child_is_found_by_its_token(tree):
    tokens, parents, _ = tree
    for node in range(1, len(tokens)):
        assert trees.child(tokens, parents, int(parents[node]), int(tokens[node])) == node
    leaves = set(range(len(tokens))) - set(parents.tolist())
    assert all(trees.child(tokens, parents, leaf, token) == -1 for leaf in leaves for token in range(6))
    assert trees.child(tokens, parents, -1, int(tokens[0])) == -1


@checked
@given(drawn_trees(), st.data())
def test_follow_inverts_path(tree, data):
    tokens, parents, _ = tree
    path = path_to(parents, data.draw(st.integers(0, len(tokens) - 1)))
    assert trees.follow(tokens, parents, tokens[path[1:]]).tolist() == path
    assert trees.follow(tokens, parents, np.append(tokens[path[1:]], [99, *tokens])).tolist() == path


@checked
@given(drawn_trees(), st.data())
def test_greedy_path_descends_where_the_target_chose_a_child(tree, data):
    tokens, parents, _ = tree
    path = path_to(parents, data.draw(st.integers(0, len(tokens) - 1)))
    choices = np.full(len(tokens), 99)
    choices[path[:-1]] = tokens[path[1:]]
    off_path = np.setdiff1d(np.arange(len(tokens)), path)
    choices[off_path] = data.draw(st.integers(0, 5))  # what is chosen after nodes not accepted must not matter
    assert trees.greedy_path(tokens, parents, choices).tolist() == path


@checked
@given(drawn_trees(), st.integers(0, 12), st.integers(0, 5), st.integers(0, 4), st.sampled_from((0.0, 0.2, 0.5, 1.0)))
def test_prune_keeps_a_tree_within_the_budget(tree, nodes, depth, width, least):
    _, parents, probability = tree
    kept = trees.prune(parents, probability, nodes, depth, width, least)
    assert kept[0] == 0
    assert (np.diff(kept) > 0).all()
    assert set(parents[kept[1:]]) <= set(kept)
    assert len(kept) - 1 <= nodes
    assert trees.depths(parents)[kept].max() <= depth
    assert (np.bincount(parents[kept[1:]], minlength=1) <= width).all()
    assert (probability[kept[1:]] >= least).all()


@checked
@given(drawn_trees(most=9), st.integers(0, 8), st.integers(0, 5))
def test_prune_is_the_best_subtree(tree, nodes, depth):
    tokens, parents, probability = tree
    level = trees.depths(parents)
    allowed = [node for node in range(1, len(tokens)) if level[node] <= depth]
    best = max(
        probability[list(chosen)].sum()
        for size in range(min(nodes, len(allowed)) + 1)
        for chosen in combinations(allowed, size)
        if set(parents[list(chosen)]) <= {0, *chosen}
    )
    kept = trees.prune(parents, probability, nodes, depth, len(tokens), 0.0)
    assert probability[kept[1:]].sum() == pytest.approx(best)


def test_prune_takes_the_better_siblings_and_the_lower_index_of_equals():
    parents, probability = np.array([-1, 0, 0, 0, 3]), np.array([1, 0.5, 0.2, 0.5, 0.5], np.float32)
    assert trees.prune(parents, probability, 9, 9, 1, 0.0).tolist() == [0, 1]
    assert trees.prune(parents, probability, 9, 9, 2, 0.0).tolist() == [0, 1, 3, 4]
    assert trees.prune(parents, probability, 2, 9, 9, 0.0).tolist() == [0, 1, 3]
    assert trees.prune(parents, probability, 9, 9, 9, 0.3).tolist() == [0, 1, 3, 4]
    probability[2] = 0.7  # less than 0.7 once it is float32, yet not below a threshold of 0.7
    assert trees.prune(parents, probability, 9, 9, 9, 0.7).tolist() == [0, 2]


def test_prune_trusts_no_child_above_its_parent():
    parents, probability = np.array([-1, 0, 1, 0]), np.array([1, 0.1, 0.9, 0.2], np.float32)
    assert trees.prune(parents, probability, 1, 9, 9, 0.0).tolist() == [0, 3]
    assert trees.prune(parents, probability, 9, 9, 9, 0.15).tolist() == [0, 3]
    probability[1] = np.nan
    assert trees.prune(parents, probability, 9, 9, 9, 0.0).tolist() == [0, 3]


@checked
@given(drawn_trees(), st.integers(0, 12))
def test_select_keeps_paths(tree, nodes):
    tokens, parents, probability = tree
    kept = trees.prune(parents, probability, nodes, 9, 9, 0.0)
    fewer, above, estimate = trees.select(tokens, parents, probability, kept)
    assert valid(above)
    assert spelled(fewer, above) == [spelled(tokens, parents)[node] for node in kept]
    assert np.array_equal(estimate, probability[kept])


@checked
@given(st.lists(drawn_trees(most=20, vocab=3, root=1), min_size=1, max_size=4))
def test_merge_is_the_union_of_paths(some):
    tokens, parents, probability, origin = trees.merge(some)
    paths = [dict(zip(spelled(t, p), q, strict=True)) for t, p, q in some]
    merged = spelled(tokens, parents)
    assert valid(parents)
    assert len(set(merged)) == len(merged)
    assert set(merged) == set().union(*paths)
    assert probability.tolist() == [max(tree.get(path, 0) for tree in paths) for path in merged]
    assert origin.tolist() == [next(i for i, tree in enumerate(paths) if path in tree) for path in merged]


def test_merge_needs_one_root():
    one, two = (
        (np.array([1]), np.array([-1]), np.ones(1, np.float32)),
        (np.array([2]), np.array([-1]), np.ones(1, np.float32)),
    )
    with pytest.raises(ValueError, match=r"2 trees with roots \[1, 2\]"):
        trees.merge([one, two])
    with pytest.raises(ValueError, match="0 trees"):
        trees.merge([])


SUCCESSORS = {0: ([1, 2, 1], [0.5, 0.25, 0.2]), 1: ([0, 2], [0.75, 0.125]), 2: ([2, 0], [0.5, 0.25])}


@pytest.mark.parametrize("nodes", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_grow_takes_the_likeliest_paths(nodes, depth):
    asked = []

    def successors(path):
        asked.append(tuple(path))
        return SUCCESSORS[path[-1]]

    tokens, parents, probability = trees.grow(0, successors, nodes, depth, 3, 0.0)
    everything, layer = {(0,): 1.0}, {(0,): 1.0}
    for _ in range(depth):
        follow = {0: {1: 0.5, 2: 0.25}, 1: {0: 0.75, 2: 0.125}, 2: {2: 0.5, 0: 0.25}}
        layer = {(*path, t): p * c for path, p in layer.items() for t, c in follow[path[-1]].items()}
        everything |= layer
    best = sorted(everything.values(), reverse=True)[: nodes + 1]
    paths = spelled(tokens, parents)
    assert valid(parents)
    assert probability.tolist() == best
    assert [everything[path] for path in paths] == best
    assert len(asked) == len(set(asked)) <= nodes
    assert all(len(path) <= depth for path in asked)


def test_grow_respects_width_and_least():
    tokens, parents, _ = trees.grow(0, lambda path: SUCCESSORS[path[-1]], 6, 9, 1, 0.0)
    assert tokens.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert trees.is_chain(parents)
    _, _, probability = trees.grow(0, lambda path: SUCCESSORS[path[-1]], 50, 9, 3, 0.125)
    assert probability.min() == 0.125
    assert len(trees.grow(0, lambda path: ([1, 2], [float("nan"), 0.5]), 50, 1, 3, 0.0)[0]) == 2


def test_grow_adjacency_reads_a_rank_probability_for_each_depth():
    matrix = np.array([[1, 2], [2, -1], [0, 0]], np.int32)
    by_depth = np.array([[0.5, 0.375], [0.5, 0.25]], np.float32)
    tokens, parents, probability = trees.grow_adjacency(matrix, by_depth, 0, 5, 3, 2, 0.0)
    assert tokens.tolist() == [0, 1, 2, 2, 0, 0]
    assert parents.tolist() == [-1, 0, 0, 1, 2, 3]
    assert probability.tolist() == [1, 0.5, 0.375, 0.25, 0.1875, 0.125]
    assert trees.grow_adjacency(matrix, by_depth, 0, 5, 3, 2, 0.375)[0].tolist() == [0, 1, 2]
    assert trees.grow_adjacency(matrix, by_depth, 0, 5, 3, 1, 0.0)[0].tolist() == [0, 1, 2, 0]
    assert len(trees.grow_adjacency(matrix, by_depth, 7, 5, 3, 2, 0.0)[0]) == 1  # no row for the root


def test_expand_template_leaves_out_what_the_matrix_lacks():
    parents, ranks = np.array([-1, 0, 0, 0, 1, 1, 2, 3, 4]), np.array([-1, 0, 1, 2, 0, 1, 0, 0, 0])
    full = np.array([[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]], np.int32)
    tokens, above, kept = trees.expand_template(full, parents, ranks, 0)
    assert kept.tolist() == list(range(9))
    assert above.tolist() == parents.tolist()
    assert all(tokens[i] == full[tokens[parents[i]], ranks[i]] for i in range(1, 9))

    gaps = np.array([[1, -1, 1], [2, 2, 0], [-1, 0, 1], [0, 1, 2]], np.int32)
    tokens, above, kept = trees.expand_template(gaps, parents, ranks, 0)
    assert kept.tolist() == [0, 1, 4]  # 2 is empty and takes 6 along, 3 repeats 1 and takes 7, 5 repeats 4, 8 is empty
    assert tokens.tolist() == [0, 1, 2]
    assert above.tolist() == [-1, 0, 1]
    assert trees.expand_template(full[:, :2], parents, ranks, 0)[2].tolist() == [0, 1, 2, 4, 5, 6, 8]  # no rank 2
    assert trees.expand_template(full, parents, ranks, 8)[0].tolist() == [8]


def sound_tree():
    return {
        "tokens": np.array([7, 1, 2, 1]),
        "parents": np.array([-1, 0, 0, 1]),
        "probability": np.array([1, 0.5, 0.25, 0.25], np.float32),
        "root_token": 7,
        "vocab": 8,
        "nodes": 3,
        "depth": 2,
        "width": 2,
    }


def put(name, index, value):
    def change(tree):
        tree[name] = tree[name].copy()
        tree[name][index] = value

    return change


FAULTS = {
    "a list, not a numpy array": lambda tree: tree.update(tokens=[7, 1, 2, 1]),
    "tokens is int32, not int64": lambda tree: tree.update(tokens=tree["tokens"].astype(np.int32)),
    "parents is float64, not int64": lambda tree: tree.update(parents=tree["parents"] * 1.0),
    "probability is float64, not float32": lambda tree: tree.update(probability=np.ones(4)),
    r"parents has shape \(2, 2\)": lambda tree: tree.update(parents=tree["parents"].reshape(2, 2)),
    "have 4, 4 and 3 entries": lambda tree: tree.update(probability=tree["probability"][:3]),
    "no root": lambda tree: tree.update({name: tree[name][:0] for name in ("tokens", "parents", "probability")}),
    "3 nodes are guessed, the budget is 2": lambda tree: tree.update(nodes=2),
    "root's token is 7, the last committed one is 6": lambda tree: tree.update(root_token=6),
    "root's parent is 0": put("parents", 0, 0),
    "node 2 has parent 2": put("parents", 2, 2),
    "node 3 has parent -1": put("parents", 3, -1),
    "node 1 has parent 900": put("parents", 1, 900),
    "node 2 has token 8, the vocabulary ends at 7": put("tokens", 2, 8),
    "node 3 has token -1": put("tokens", 3, -1),
    "node 1 has probability nan": put("probability", 1, np.nan),
    "node 2 has probability 1.5": put("probability", 2, 1.5),
    "node 3 has probability -0.5": put("probability", 3, -0.5),
    "node 3 is 2 deep, the budget is 1": lambda tree: tree.update(depth=1),
    "node 0 has more than 1 children": lambda tree: tree.update(width=1),
    "nodes 1 and 2 both guess token 1 after node 0": put("tokens", 2, 1),
}


@pytest.mark.parametrize("words", FAULTS)
def test_fault_says_what_is_wrong(words):
    tree = sound_tree()
    assert trees.fault(**tree) is None
    FAULTS[words](tree)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(trees.fault(**tree))


def test_independent_draws_may_be_twins():
    tree = sound_tree()
    FAULTS["nodes 1 and 2 both guess token 1 after node 0"](tree)
    assert trees.fault(**tree, twins=True) is None


def test_fault_reads_arrays_of_any_layout():
    tree = sound_tree() | {"tokens": np.repeat(np.array([7, 1, 2, 1]), 2)[::2]}
    tree["parents"].flags.writeable = False
    assert trees.fault(**tree) is None


def test_every_name_is_there_and_numba_waits_for_one_that_needs_it():
    assert all(callable(getattr(trees, name)) for name in trees.__all__)
    code = (
        "import sys, specdec; assert 'specdec.trees' not in sys.modules\n"
        "from specdec.trees import draw_text; assert 'numba' not in sys.modules\n"
        "import specdec.trees.path; from specdec.trees import follow; assert callable(follow)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
