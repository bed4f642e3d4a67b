"""RecyclingDrafter: rows from every node of every verdict, unfolded into trees; kept apart, bounded, saved."""

import json
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from specdec import storage, trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import RecyclingDrafter, recycling_file, recycling_numba
from specdec.trees.optimal import fastest_shape, optimal_shape

VOCAB = 64
WIDE = Budget(nodes=80, depth=6, width=8)

# How many children each node of the paper's template has, level by level.
CHILDREN = (
    "8",
    "84321111",
    "83211111" + "2100" + "100" + "10" + "1100",
    "52111000" + "100" + "10" + "00000" + "10" + "0" + "1100",
    "31100" + "10" + "000" + "10100",
    "20010000",
    "000",
)


class Target:
    """A Markov chain that stands for a model: the candidates after a token are a fixed ranking."""

    def __init__(self, seed=0, vocab=VOCAB):
        rng = np.random.default_rng(seed)
        self.candidates = np.array([rng.permutation(vocab) for _ in range(vocab)])

    def prompt(self, tokens, k, namespace=""):
        """A context whose prompt was fed."""
        n, context = len(tokens), Context(tokens, namespace)
        tree = DraftTree(context.tokens, np.arange(-1, n - 1), np.ones(n, np.float32), ("",) * n)
        candidates = self.candidates[tokens, :k]
        context.extend(Verdict(tree, np.arange(n), candidates[-1:, 0], candidates, prompt=True))
        return context

    def verify(self, context, tree, k):
        candidates = self.candidates[tree.tokens, :k]
        path = trees.greedy_path(tree.tokens, tree.parents, candidates[:, 0])
        return Verdict(tree, path, candidates[path, 0], candidates)


class Sampled(Target):
    """Chooses candidate r with probability ``chances[r]``."""

    def __init__(self, chances, seed=0, vocab=VOCAB):
        super().__init__(seed, vocab)
        self.chances, self.rng = chances, np.random.default_rng(seed)

    def verify(self, context, tree, k):
        candidates = self.candidates[tree.tokens, :k]
        node, path, tokens = 0, [], []
        while node >= 0:
            path.append(node)
            tokens.append(candidates[node, self.rng.choice(len(self.chances), p=self.chances)])
            node = trees.child(tree.tokens, tree.parents, node, tokens[-1])
        return Verdict(tree, np.array(path), np.array(tokens), candidates)


def decode(drafter, target, context, steps, budget=WIDE):
    """Some steps of the loop; the trees that were drafted."""
    drafted = []
    for _ in range(steps):
        [tree] = drafter.draft([context], [budget])
        last, limits = int(context.tokens[-1]), (budget.nodes, budget.depth, budget.width)
        assert trees.fault(tree.tokens, tree.parents, tree.probability, last, VOCAB, *limits) is None
        context.extend(target.verify(context, tree, drafter.k))
        drafted.append(tree)
    return drafted


def judged(tokens, parents, path, candidates, prompt=False):
    tree = DraftTree(np.array(tokens), np.array(parents), np.ones(len(tokens), np.float32), ("",) * len(tokens))
    return Verdict(tree, np.array(path), np.zeros(len(path), np.int64), np.array(candidates), prompt=prompt)


def learn(drafter, verdict, namespace=""):
    context = Context([0], namespace)
    context.extend(verdict)
    drafter.draft([context], [Budget(0, 0, 0)])


def row(drafter, token, namespace=""):
    """The known candidates of a token, read off the tree that is drafted from it."""
    [tree] = drafter.draft([Context([token], namespace)], [Budget(99, 1, 99)])
    return tree.tokens[1:].tolist()


def test_the_paper_template_has_80_nodes_in_levels_of_8_21_25_15_8_3_and_40_leaves():
    drafter, target = RecyclingDrafter(template="paper", vocab=VOCAB), Target()
    decode(drafter, target, target.prompt(np.arange(VOCAB), 8), 1)
    [tree] = drafter.draft([target.prompt([5], 8)], [WIDE])
    assert len(tree) == 81
    assert np.bincount(trees.depths(tree.parents)).tolist() == [1, 8, 21, 25, 15, 8, 3]
    children = np.bincount(tree.parents[1:], minlength=81)
    assert (children == 0).sum() == 40
    for level, counts in enumerate(CHILDREN):
        assert children[trees.depths(tree.parents) == level].tolist() == [int(count) for count in counts]
    for node in range(81):
        guesses = tree.tokens[tree.parents == node]
        assert guesses.tolist() == target.candidates[tree.tokens[node], : len(guesses)].tolist()


@pytest.mark.parametrize("template", [None, "paper"])
def test_every_guess_is_what_the_matrix_says_after_its_parent(template):
    drafter, target = RecyclingDrafter(template=template), Target()
    drafted = decode(drafter, target, target.prompt([1, 2, 3], 8), 30)
    assert max(map(len, drafted)) > 60
    for tree in drafted:
        for node in range(1, len(tree)):
            assert tree.tokens[node] in target.candidates[tree.tokens[tree.parents[node]], :8]


def test_rows_of_rejected_nodes_are_learnt_and_others_left_alone():
    drafter = RecyclingDrafter(k=2)
    learn(drafter, judged([3, 4, 5, 6], [-1, 0, 0, 1], [0, 2], [[5, 4], [10, 11], [12, 13], [14, 15]]))
    assert [row(drafter, token) for token in (3, 4, 5, 6)] == [[5, 4], [10, 11], [12, 13], [14, 15]]
    assert row(drafter, 10) == row(drafter, 63) == row(drafter, 10_000) == []
    learn(drafter, judged([4], [-1], [0], [[20, 21]]))
    assert [row(drafter, token) for token in (3, 4, 5)] == [[5, 4], [20, 21], [12, 13]]


def test_of_one_token_twice_the_last_accepted_wins_then_the_shallowest_then_the_first():
    tokens, parents = [1, 7, 7, 7, 8, 8, 8], [-1, 0, 1, 2, 0, 1, 2]
    candidates = [[i + 20] for i in range(7)]
    drafter = RecyclingDrafter(k=1)
    learn(drafter, judged(tokens, parents, [0, 1, 2], candidates))
    assert (row(drafter, 7), row(drafter, 8)) == ([22], [24])
    learn(drafter, judged(tokens, parents, [0], candidates))
    assert row(drafter, 7) == [21]
    learn(drafter, judged([1, 2, 9, 9], [-1, 0, 1, 0], [0], [[40 + i] for i in range(4)]))
    assert row(drafter, 9) == [43]
    learn(drafter, judged([1, 2, 3, 9, 9], [-1, 0, 0, 1, 2], [0], [[60 + i] for i in range(5)]))
    assert row(drafter, 9) == [63]
    learn(drafter, judged([1, 9, 2, 9], [-1, 0, 1, 2], [0], [[50 + i] for i in range(4)], prompt=True))
    assert row(drafter, 9) == [53]


def test_greedy_output_is_the_same_whatever_the_matrix_holds():
    target, hot, nonsense = Target(), RecyclingDrafter(), RecyclingDrafter()
    decode(hot, target, target.prompt([1, 2], 8), 40)
    decode(nonsense, Target(seed=9), Target(seed=9).prompt(np.arange(VOCAB), 8), 40)
    plain = [1, 2]
    while len(plain) < 40:
        plain.append(int(target.candidates[plain[-1], 0]))
    for drafter in (RecyclingDrafter(), hot, nonsense, RecyclingDrafter(template="paper")):
        context = target.prompt([1, 2], 8)
        decode(drafter, target, context, 40)
        assert context.tokens[:40].tolist() == plain


def test_a_second_run_is_faster_and_reset_brings_the_first_back():
    drafter, chances = RecyclingDrafter(k=4), [0.6, 0.2, 0.1, 0.1]

    def tokens_in_30_steps(namespace=""):
        target = Sampled(chances, seed=1)
        context = target.prompt([1, 2], 4, namespace)
        decode(drafter, target, context, 30, Budget(16, 6, 4))
        return len(context.tokens)

    first, second = tokens_in_30_steps(), tokens_in_30_steps()
    assert second > 1.2 * first
    drafter.reset()
    assert tokens_in_30_steps() == first
    drafter.reset("another")
    assert row(drafter, 1)
    drafter.reset("")
    assert not row(drafter, 1)


def test_memory_is_vocabulary_times_k_int32():
    drafter = RecyclingDrafter(k=8, vocab=4096)
    empty = drafter.bytes_used
    learn(drafter, judged([4095], [-1], [0], [[17] * 8]))
    assert drafter.bytes_used - empty == 4096 * 8 * 4
    grown = RecyclingDrafter(k=8)
    learn(grown, judged([1], [-1], [0], [[5000] + [1] * 7]))
    assert 5001 * 8 * 4 <= grown.bytes_used - empty <= 6500 * 8 * 4
    learn(grown, judged([9000], [-1], [0], [[1] * 8]))
    assert row(grown, 1) == [5000, 1]  # rows survive growth


def test_memory_is_bounded_by_leaving_out_large_token_ids(tmp_path):
    rates = RecyclingDrafter(k=2).bytes_used
    small = RecyclingDrafter(k=2, max_bytes=rates + 100 * 8 + 7)
    learn(small, judged([99, 100, 4], [-1, 0, 0], [0], [[99, 100], [1, 2], [5000, 7]]))
    assert small.bytes_used == rates + 100 * 8 <= small.max_bytes
    assert row(small, 99) == [99]
    assert row(small, 4) == [7]
    assert row(small, 100) == []
    assert small.draft([Context([4])], [WIDE])[0].tokens.tolist() == [4, 7]
    large = RecyclingDrafter(k=2)
    learn(large, judged([4, 100], [-1, 0], [0], [[100, 7], [1, 2]]))
    for each in (small, large):
        each.save(tmp_path / "memory")
        small.load(tmp_path / "memory")
        assert row(small, 4) == [7]
        assert small.bytes_used <= small.max_bytes
    small.load(tmp_path / "memory")
    learn(small, judged([98], [-1], [0], [[98, 100]]))
    assert row(small, 98) == [98]
    assert RecyclingDrafter(k=2, vocab=5000, max_bytes=small.max_bytes).bytes_used == rates
    with pytest.raises(ValueError, match="max_bytes"):
        RecyclingDrafter(k=2, max_bytes=rates)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_any_k_works(k):
    drafter, target = RecyclingDrafter(k=k), Target()
    assert drafter.topk == k
    context = target.prompt([1, 2, 3], k)
    decode(drafter, target, context, 30, Budget(80, 6, 16))
    assert row(drafter, 1) == target.candidates[1, :k].tolist()
    assert len(context.tokens) > 60
    wide = target.prompt([40], 16)  # another drafter wanted more candidates
    drafter.draft([wide], [Budget(0, 0, 0)])
    assert row(drafter, 40) == target.candidates[40, :k].tolist()
    narrow = target.prompt([41], 1)
    drafter.draft([narrow], [Budget(0, 0, 0)])
    assert row(drafter, 41) == target.candidates[41, :1].tolist()


def test_two_runs_are_alike():
    runs = []
    for _ in range(2):
        target = Sampled([0.5, 0.3, 0.2], seed=3)
        runs.append(decode(RecyclingDrafter(), target, target.prompt([1, 2], 8), 40))
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.parents, b.parents)
        assert np.array_equal(a.probability, b.probability)


def test_a_template_may_be_given_and_is_cut_to_the_budget():
    target = Target()
    drafter = RecyclingDrafter(template=([-1, 0, 0, 1], [-1, 2, 0, 1]))
    context = target.prompt(np.arange(VOCAB), 8)
    drafter.draft([context], [WIDE])
    root = int(context.tokens[-1])
    [tree] = drafter.draft([context], [WIDE])
    two = target.candidates[root, 2]
    assert tree.tokens.tolist() == [root, two, target.candidates[root, 0], target.candidates[two, 1]]
    [tree] = drafter.draft([context], [Budget(1, 6, 8)])
    assert tree.tokens.tolist() == [root, target.candidates[root, 0]]
    [tree] = drafter.draft([context], [Budget(80, 1, 8)])
    assert len(tree) == 3


@pytest.mark.parametrize(
    "template", ["other", ([], []), ([-1, 0], [-1]), ([0, 0], [-1, 0]), ([-1, 1], [-1, 0]), ([-1, 0], [-1, -1])]
)
def test_a_template_that_is_no_tree_is_refused(template):
    with pytest.raises(ValueError, match="template"):
        RecyclingDrafter(template=template)


def test_wrong_numbers_are_refused():
    for arguments in ({"k": 0}, {"namespaces": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            RecyclingDrafter(**arguments)
    verdict = judged([1, 2], [-1, 0], [0], [[1] * 8])
    with pytest.raises(ValueError, match="one row of candidates per node"):
        learn(RecyclingDrafter(), verdict)


def test_rates_by_rank_are_learnt():
    chances = [0.1, 0.6, 0.3]
    drafter, target = RecyclingDrafter(k=4), Sampled(chances, seed=4)
    context = target.prompt(np.arange(VOCAB), 4)
    decode(drafter, target, context, 1500, Budget(12, 4, 4))
    [tree] = drafter.draft([context], [Budget(99, 1, 4)])
    rates = [float(tree.probability[tree.tokens == token].sum()) for token in target.candidates[tree.tokens[0], :4]]
    assert rates == pytest.approx([*chances, 0], abs=0.06)


def test_a_template_may_be_the_best_tree_for_the_texts_so_far(tmp_path):
    """Here the second candidate is the likeliest, which no other model's answers would have told."""
    chances = [0.2, 0.6, 0.0, 0.2]
    measured, target = RecyclingDrafter(k=4), Sampled(chances, seed=6)
    unmeasured, context = optimal_shape(measured.acceptance, 9, 5), target.prompt(np.arange(VOCAB), 4)
    decode(measured, target, context, 1500, Budget(12, 4, 4))
    assert measured.acceptance == pytest.approx(chances, abs=0.06)
    assert measured.acceptance.sum() <= 1
    measured.save(tmp_path / "learnt")
    shape = optimal_shape(measured.acceptance, 9, 5)
    fastest, _ = fastest_shape(measured.acceptance, 1 + 0.05 * np.arange(32.0), 0.01, 5)
    assert 1 < len(fastest.values) < 32

    def tokens_per_step(shape):
        drafter = RecyclingDrafter(k=4, template=(shape.parents, shape.ranks))
        drafter.load(tmp_path / "learnt")
        before = len(context.tokens)
        assert {len(tree) for tree in decode(drafter, target, context, 1000, Budget(8, 5, 4))} == {9}
        return (len(context.tokens) - before) / 1000

    best = tokens_per_step(shape)
    assert best == pytest.approx(shape.values.sum(), rel=0.06)
    assert best > 1.2 * tokens_per_step(unmeasured)


def test_promised_and_accepted_agree():
    drafter, target = RecyclingDrafter(k=4), Sampled([0.55, 0.25, 0.2], seed=5)
    context = target.prompt(np.arange(VOCAB), 4)
    decode(drafter, target, context, 600, Budget(12, 4, 4))
    before = len(context.tokens)
    drafted = decode(drafter, target, context, 400, Budget(12, 4, 4))
    promised = sum(float(tree.probability[1:].sum()) for tree in drafted)
    assert promised == pytest.approx(len(context.tokens) - before - 400, rel=0.1)


def test_an_empty_budget_only_learns_and_steps_may_be_skipped():
    drafter, target = RecyclingDrafter(), Target()
    context = target.prompt([1, 2, 3], 8)
    [tree] = drafter.draft([context], [Budget(0, 0, 0)])
    assert len(tree) == 1
    assert row(drafter, 2) == target.candidates[2, :8].tolist()
    for _ in range(5):
        tree = DraftTree.root(int(context.tokens[-1]))
        context.extend(target.verify(context, tree, 8))
    [tree] = drafter.draft([context], [WIDE])
    assert row(drafter, int(context.tokens[-2])) == target.candidates[context.tokens[-2], :8].tolist()
    context.finished = True
    drafter.draft([context], [Budget(0, 0, 0)])
    assert not context.scratch


def test_a_verdict_counts_once():
    drafter = RecyclingDrafter(k=1)
    context = Context([0])
    context.extend(judged([5], [-1], [0], [[6]]))
    drafter.draft([context], [Budget(0, 0, 0)])
    learn(drafter, judged([5], [-1], [0], [[7]]))
    drafter.draft([context], [Budget(0, 0, 0)])
    assert row(drafter, 5) == [7]


def test_contexts_drafted_alternately_learn_from_each_other():
    drafter, target = RecyclingDrafter(), Target()
    a, b = target.prompt([1, 2], 8), target.prompt([30, 31], 8)
    for _ in range(10):
        for context in (a, b):
            decode(drafter, target, context, 1)
    together = drafter.draft([a, b], [WIDE, WIDE])
    assert [int(tree.tokens[0]) for tree in together] == [int(a.tokens[-1]), int(b.tokens[-1])]
    plain = [1, 2]
    while len(plain) < len(a.tokens):
        plain.append(int(target.candidates[plain[-1], 0]))
    assert a.tokens.tolist() == plain
    assert row(drafter, 30) == target.candidates[30, :8].tolist()


def test_namespaces_share_nothing_and_the_least_recently_used_is_forgotten():
    drafter = RecyclingDrafter(k=1, namespaces=2)
    learn(drafter, judged([5], [-1], [0], [[6]]), "a")
    learn(drafter, judged([5], [-1], [0], [[7]]), "b")
    assert row(drafter, 5, "a") == [6]
    learn(drafter, judged([5], [-1], [0], [[8]]), "c")
    assert row(drafter, 5, "a") == [6]
    assert row(drafter, 5, "b") == []


def test_threads_may_share_a_drafter():
    drafter, faults = RecyclingDrafter(k=4), []

    def work(seed):
        try:
            target = Sampled([0.4, 0.3, 0.3], seed=seed)
            decode(drafter, target, target.prompt([seed, 2], 4), 300, Budget(32, 6, 4))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("template", [None, "paper"])
def test_rows_stand_still_while_a_tree_is_read_off(monkeypatch, template):
    drafter, target, locked = RecyclingDrafter(template=template), Target(), []
    for module, name in ((recycling_numba, "unfold"), (trees, "expand_template")):
        function = getattr(module, name)

        def watched(*arguments, function=function):
            locked.append(drafter._memories[""].lock.locked())
            return function(*arguments)

        monkeypatch.setattr(module, name, watched)
    decode(drafter, target, target.prompt([1, 2], 8), 2)
    assert locked == [True, True]


def trained(k=4, namespace="tenant"):
    drafter, target = RecyclingDrafter(k=k), Sampled([0.5, 0.3, 0.2], seed=7)
    decode(drafter, target, target.prompt([1, 2], k, namespace), 40)
    return drafter


def test_what_was_saved_is_loaded(tmp_path):
    drafter, other = trained(), RecyclingDrafter(k=4)
    drafter.save(tmp_path / "memory")
    other.load(tmp_path / "memory")
    for token in range(VOCAB):
        assert row(other, token, "tenant") == row(drafter, token, "tenant")
    trees_ = [each.draft([Context([2], "tenant")], [WIDE])[0] for each in (drafter, other)]
    assert len(trees_[0]) > 10
    assert np.array_equal(trees_[0].probability, trees_[1].probability)
    learn(other, judged([5], [-1], [0], [[9, 1, 2, 3]]), "tenant")
    assert row(other, 5, "tenant") == [9, 1, 2, 3]
    with safe_open(tmp_path / "memory", framework="np") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["k"] == 4
    assert facts["vocab"] >= VOCAB


def damaged(path, content):
    middle = len(content) - 4000
    return {
        "empty": b"",
        "truncated": content[:-10],
        "header only": content[:60],
        "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"hello, this is no such file at all",
    }


@pytest.mark.parametrize("kind", damaged(None, bytes(5000)))
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path, kind):
    drafter, path = trained(), tmp_path / "memory"
    before = [row(drafter, token, "tenant") for token in range(VOCAB)]
    trained().save(path)
    path.write_bytes(damaged(path, path.read_bytes())[kind])
    with pytest.raises(ValueError, match="memory"):
        drafter.load(path)
    assert [row(drafter, token, "tenant") for token in range(VOCAB)] == before


def test_another_kind_of_file_is_refused(tmp_path):
    path, drafter = tmp_path / "memory", trained()
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="format"):
        drafter.load(path)
    trained(k=5).save(path)
    with pytest.raises(ValueError, match="k=4"):
        drafter.load(path)
    with pytest.raises(FileNotFoundError):
        drafter.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "value"),
    [("version", 2), ("namespaces", ["x"]), ("namespaces", ["tenant", "more"]), ("k", 8)],
)
def test_altered_metadata_is_refused(tmp_path, name, value):
    path, drafter = tmp_path / "memory", trained()
    drafter.save(path)
    with safe_open(path, framework="np") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    if name in metadata:
        metadata[name] = str(value)
    else:
        metadata["facts"] = json.dumps(json.loads(metadata["facts"]) | {name: value})
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="memory"):
        drafter.load(path)


def test_a_file_whose_rows_point_outside_is_refused(tmp_path):
    path = tmp_path / "memory"
    for entry in (99, -2):
        counts = {"accepted": np.ones(32), "offered": np.ones(32)}
        recycling_file.write(path, 4, {"": np.full((10, 4), entry, np.int32)}, **counts)
        with pytest.raises(ValueError, match="outside"):
            RecyclingDrafter(k=4).load(path)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, drafter = tmp_path / "memory", trained()
    drafter.save(path)
    content = path.read_bytes()

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        drafter.save(path)
    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"memory", ".memory.lock"}
