"""RetrievalDrafter and its corpus: built once, mapped, checked; the longest match and its continuations by weight."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import trees
from specdec.core import Budget, Context, Verdict
from specdec.drafters import corpus, retrieval_numba, votes
from specdec.drafters.corpus import Corpus
from specdec.drafters.retrieval import RetrievalDrafter
from tests import tiny

WIDE = Budget(nodes=500, depth=6, width=64)
CHAIN = Budget(nodes=8, depth=8, width=1)

pytest.importorskip("pydivsufsort", reason="building an index needs pydivsufsort")


def draft(drafter, text, budget=WIDE):
    [tree] = drafter.draft([Context(text)], [budget])
    limits = budget.nodes, budget.depth, budget.width
    assert trees.fault(tree.tokens, tree.parents, tree.probability, text[-1], 2**62, *limits) is None
    return tree


def paths(tree):
    found = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def play(drafter, text, prompt, budget):
    context, drafted = Context(text[:prompt]), []
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [budget])
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        context.extend(Verdict(tree, path, truth[: len(path)]))
        drafted.append((tree, len(path) - 1))
    return drafted


def longest(documents, text, least, most):
    """By naive search: the longest end of the text in any document, and what followed each occurrence."""
    for length in range(min(most, len(text)), least - 1, -1):
        query, after = text[-length:], []
        for document in documents:
            for i in range(len(document) - length + 1):
                if document[i : i + length] == query:
                    after.append(document[i + length :])
        if after:
            return length, after
    return 0, []


documents = st.lists(st.lists(st.sampled_from([0, 1, 2, 70_000]), max_size=30), min_size=1, max_size=5).filter(any)


@given(documents, st.lists(st.sampled_from([0, 1, 2, 70_000]), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_the_tree_is_every_continuation_of_the_longest_match_by_naive_search(tmp_path_factory, texts, text, least):
    out = tmp_path_factory.mktemp("index") / "index"
    drafter = RetrievalDrafter(corpus.build(texts, out), max_match=5, min_match=least, samples=10_000)
    length, after = longest(texts, text, least, 5)
    counts = Counter(tuple(rest[: n + 1]) for rest in after for n in range(min(len(rest), WIDE.depth)))
    counts[()] = len(after)
    tree = draft(drafter, text)
    assert set(paths(tree)) == set(counts) - {()}
    rates = votes.prior()
    for node, path in enumerate(paths(tree), 1):
        kind = votes.vote_kind(length + len(path) - 1, counts[path], counts[path[:-1]])
        assert tree.probability[node] == pytest.approx(tree.probability[tree.parents[node]] * rates[kind], rel=1e-5)
    small = draft(drafter, text, Budget(5, 6, 64))
    best = np.sort(tree.probability[1:])[::-1][:5]
    assert np.allclose(np.sort(small.probability[1:])[::-1], best)


@given(documents)
@settings(max_examples=60, deadline=None)
def test_suffixes_are_all_positions_of_tokens_in_order(tmp_path_factory, texts):
    index = corpus.build(texts, tmp_path_factory.mktemp("index") / "index")
    tokens = index.tokens.tolist()
    assert tokens == [token for text in texts if text for token in [*text, corpus.SEPARATOR]]
    ends = [tokens[position:] for position in index.suffixes]
    assert ends == sorted(ends)
    assert sorted(index.suffixes.tolist()) == [i for i, token in enumerate(tokens) if token >= 0]
    assert index.documents == sum(map(bool, texts))
    index.verify()


def test_a_frequent_match_is_sampled_evenly(tmp_path):
    texts = [[1, 2, 10 + i % 4, i] for i in range(400)]
    index = corpus.build(texts, tmp_path / "index")
    tree = draft(RetrievalDrafter(index, samples=40), [1, 2], Budget(4, 1, 4))
    assert sorted(tree.tokens[1:].tolist()) == [10, 11, 12, 13]
    assert len(set(tree.probability[1:].tolist())) == 1
    assert len(draft(RetrievalDrafter(index, samples=1), [1, 2], WIDE)) == 3


def test_tokens_above_16_bits_and_budgets(tmp_path):
    index = corpus.build([[100_000, 5, 2**31 - 1, 7], [100_000, 5, 6]], tmp_path / "index")
    drafter = RetrievalDrafter(index)
    assert set(paths(draft(drafter, [100_000, 5]))) == {(2**31 - 1,), (2**31 - 1, 7), (6,)}
    assert len(draft(drafter, [100_000, 5], Budget(8, 8, 1))) <= 3
    assert len(draft(drafter, [100_000, 5], Budget(8, 1, 8))) == 3
    assert len(draft(drafter, [5, 100_000 - 65_536])) == 1
    for budget in (Budget(0, 0, 0), Budget(4, 0, 4), Budget(4, 4, 0)):
        assert len(draft(drafter, [100_000, 5], budget)) == 1
    assert len(draft(drafter, [100_000, 5], Budget(8, 8, 8, least=0.99))) == 1


def test_files_of_text_are_read_and_encoded(tmp_path):
    (tmp_path / "a.txt").write_text("plain text")
    rows = ["a string", {"text": "a text"}, {"content": "content"}, {"messages": [{"content": "one"}, {"content": ""}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "x", "response": "y"}]))
    tokenizer, told = tiny.tokenizer(), []
    sources = [tmp_path / "a.txt", str(tmp_path / "b.jsonl"), [5, 6]]
    index = corpus.build(sources, tmp_path / "index", tokenizer, lambda *step: told.append(step))
    texts = "".join(tokenizer.decode([t]) if t >= 0 else "|" for t in index.tokens[:-3].tolist())
    assert texts == "plain text|a string|a text|content|one|y|"
    assert index.tokens[-3:].tolist() == [5, 6, -1]
    assert index.documents == 7
    assert told == sorted(told)
    assert told[-1] == ("sorting", len(index.tokens))
    assert len(corpus.build(tmp_path / "a.txt", tmp_path / "one", tokenizer).tokens) == 11


def test_what_cannot_be_indexed_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"title": 3}\n')
    (tmp_path / "worse.jsonl").write_text("{")
    tokenizer = tiny.tokenizer()
    wrong = [
        ([tmp_path / "a.txt"], None, "tokenizer"),
        ([tmp_path / "bad.jsonl"], tokenizer, "line 2"),
        ([tmp_path / "worse.jsonl"], tokenizer, "not JSON"),
        ([[1, -1]], None, "document 0"),
        ([[1], [2**31]], None, "document 1"),
        ([[0.5]], None, "document 0"),
        ([[]], None, "no tokens"),
    ]
    before = sorted(tmp_path.iterdir())
    for sources, tokens, match in wrong:
        with pytest.raises(ValueError, match=match):
            corpus.build(sources, tmp_path / "index", tokens)
    assert sorted(tmp_path.iterdir()) == before
    corpus.build([[1]], tmp_path / "index")
    with pytest.raises(FileExistsError, match="remove it"):
        corpus.build([[1]], tmp_path / "index")


@pytest.fixture
def index(tmp_path):
    rng = np.random.default_rng(0)
    return corpus.build([rng.integers(0, 9, 50) for _ in range(20)], tmp_path / "index")


def test_damage_is_found(index, tmp_path):
    def damaged(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(index.path, copy)
        content = bytearray((copy / name).read_bytes())
        change(content)
        (copy / name).write_bytes(content)
        return copy

    def flip(content):
        content[len(content) // 2] ^= 1

    for name in ("tokens", "suffixes"):
        with pytest.raises(ValueError, match="bytes"):
            Corpus.open(damaged(name, lambda content: content.pop()))
        with pytest.raises(ValueError, match="checksum"):
            Corpus.open(damaged(name, flip)).verify()
    for change in (flip, lambda content: content.clear(), lambda content: content.extend(b"0")):
        with pytest.raises(ValueError, match=r"header\.json"):
            Corpus.open(damaged("header.json", change))
    header = json.loads((index.path / "header.json").read_text())
    (tmp_path / "copy/header.json").write_text(json.dumps(header | {"documents": 3}))
    with pytest.raises(ValueError, match="checksum"):
        Corpus.open(tmp_path / "copy")
    (tmp_path / "copy/header.json").write_text(json.dumps(header | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        RetrievalDrafter(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="no index"):
        Corpus.open(tmp_path)


def test_suffixes_that_point_nowhere_do_no_harm(index):
    wild = index.suffixes.copy()
    wild[::3] = [2**30, -(2**30), -1] * (len(wild[::3]) // 3) + [0] * (len(wild[::3]) % 3)
    for text in np.random.default_rng(1).integers(0, 9, (200, 6)):
        low, high, match = retrieval_numba.find_longest(index.tokens, wild, text, 1, 6)
        counts = np.ones(votes.KINDS), np.full(votes.KINDS, 2.0)
        grown = retrieval_numba.grow_continuations(
            index.tokens, wild, (low, high, match), 64, *counts, text[-1], (20, 6, 4)
        )
        assert set(grown[0].tolist()) <= set(range(9))


def test_an_index_is_read_only_and_other_processes_read_it_too(index):
    assert not index.tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        index.suffixes[0] = 1
    program = "import sys; from specdec.drafters.corpus import Corpus; print(Corpus.open(sys.argv[1]).tokens.sum())"
    ran = subprocess.run([sys.executable, "-c", program, index.path], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == index.tokens.sum()


def test_a_text_of_the_corpus_takes_few_steps_and_more_corpus_takes_fewer(tmp_path):
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, 50, 200) for _ in range(10)]
    steps = []
    for known in (1, 5, 10):
        drafter = RetrievalDrafter(corpus.build(texts[:known], tmp_path / str(known)))
        steps.append(sum(len(play(drafter, text, 10, CHAIN)) for text in texts))
    assert steps[0] > 1.5 * steps[1] > 4 * steps[2]


def test_probabilities_come_true(tmp_path):
    rng = np.random.default_rng(3)
    follow = rng.integers(0, 30, (30, 3))
    text = [0]
    for choice in rng.choice(3, 9000, p=[0.6, 0.3, 0.1]):
        text.append(int(follow[text[-1], choice]))
    drafter = RetrievalDrafter(corpus.build([text[:6000]], tmp_path / "index"), min_match=1)
    drafted = play(drafter, text[6000:], 10, Budget(16, 6, 4))[100:]
    promised = sum(float(tree.probability[1:].sum()) for tree, _ in drafted)
    assert promised == pytest.approx(sum(accepted for _, accepted in drafted), rel=0.15)
    learnt = drafter._acceptance.rate
    drafter.reset()
    assert not np.allclose(drafter._acceptance.rate, learnt)


def test_a_finished_context_is_learnt_from_and_let_go(index):
    drafter, context = RetrievalDrafter(index), Context(index.tokens[:10])
    drafter.draft([context], [CHAIN])
    context.finished = True
    assert len(drafter.draft([context], [Budget(0, 0, 0)])[0]) == 1
    assert not context.scratch


@pytest.mark.parametrize("arguments", [{"max_match": 0}, {"min_match": 0}, {"min_match": 17}, {"samples": 0}])
def test_wrong_arguments_are_refused(index, arguments):
    with pytest.raises(ValueError, match=r"min_match|samples"):
        RetrievalDrafter(index, **arguments)


def test_generation_is_exact_and_a_known_answer_takes_few_steps(tmp_path):
    model, greedy = tiny.model(), {"input_ids": tiny.prompt(), "max_new_tokens": 40, "do_sample": False}
    answer = tiny.texts(tiny.sequences(model.generate(**greedy)))
    drafter = RetrievalDrafter(corpus.build(answer, tmp_path / "index"))
    assert tiny.same(model, greedy, drafter=drafter).stats.steps < 12
    tiny.same(model, {**greedy, "do_sample": True, "temperature": 0.7}, drafter=drafter, seed=3)
