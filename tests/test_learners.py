"""What all drafters that learn from text promise alike: files, forgetting, bounds, namespaces, and threads."""

import threading

import numpy as np
import pytest

from specdec import trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import (
    LookaheadDrafter,
    MergedDrafter,
    PredictedOutput,
    RecyclingDrafter,
    RetrievalDrafter,
    SuffixDrafter,
    corpus,
)

WIDE = Budget(nodes=32, depth=8, width=4)
TEXT = np.random.default_rng(0).integers(0, 50, 60).tolist() * 4
GIVEN = ("retrieval", "predicted")  # they are given what they guess from, and learn only how far to trust it


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    index = tmp_path_factory.mktemp("corpus") / "index"
    pytest.importorskip("pydivsufsort", reason="building an index needs pydivsufsort")
    corpus.build([TEXT, TEXT[7:50]], index)
    makers = {
        "suffix": SuffixDrafter,
        "lookahead": LookaheadDrafter,
        "recycling": lambda: RecyclingDrafter(k=4),
        "retrieval": lambda: RetrievalDrafter(index),
        "predicted": lambda: PredictedOutput(TEXT),
    }
    # On a clock that stands still every part can be afforded, on however busy a machine.
    return makers | {"merged": lambda: MergedDrafter([make() for make in makers.values()], clock=lambda: 0.0)}


NAMES = ("suffix", "lookahead", "recycling", "retrieval", "predicted", "merged")
all_of_them = pytest.mark.parametrize("name", NAMES)


def play(drafter, text, namespace="", prompt=5):
    """Write ``text`` with what is accepted of its drafts; every tree, and the tokens that came of them."""
    context, drafted = Context(text[:prompt], namespace), []
    while len(context.tokens) < len(text):
        [tree] = drafter.draft([context], [WIDE])
        assert trees.fault(tree.tokens, tree.parents, tree.probability, context.tokens[-1], 2**31, 32, 8, 4) is None
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        candidates = np.stack([(tree.tokens + i) % 50 for i in range(1, 9)], axis=1)
        context.extend(Verdict(tree, path, truth[: len(path)], candidates))
        drafted.append(tree)
    context.finished = True
    drafter.draft([context], [Budget(0, 0, 0)])
    return drafted, context.tokens.tolist()


def guesses(drafter, namespace="", text=(*TEXT[20:25], 999, *TEXT[3:9])):
    [tree] = drafter.draft([Context(text, namespace)], [WIDE])
    return tree.tokens.tolist(), tree.probability.tolist()


@all_of_them
def test_what_is_loaded_is_what_was_saved(makers, name, tmp_path):
    saved, fresh = makers[name](), makers[name]()
    play(saved, TEXT)
    assert guesses(fresh) != guesses(saved)
    saved.save(tmp_path / "file")
    fresh.load(tmp_path / "file")
    assert len(guesses(saved)[0]) > 1
    assert guesses(fresh) == guesses(saved)


@all_of_them
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_leaves_the_old_state(makers, name, damage, tmp_path):
    drafter, path = makers[name](), tmp_path / "file"
    play(drafter, TEXT)
    before = guesses(drafter)
    drafter.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "altered" else content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match="file"):
        drafter.load(path)
    assert guesses(drafter) == before


@all_of_them
def test_reset_forgets(makers, name):
    drafter = makers[name]()
    new = guesses(drafter)
    play(drafter, TEXT)
    assert guesses(drafter) != new
    before = guesses(drafter)
    drafter.reset("unheard of")
    assert guesses(drafter) == before
    drafter.reset()
    assert guesses(drafter)[0] == new[0]


@all_of_them
def test_it_says_what_it_holds_and_keeps_its_bound(makers, name):
    drafter = makers[name]()
    for seed in range(3):
        play(drafter, np.random.default_rng(seed).integers(0, 50, 200).tolist())
    assert drafter.bytes_used > 0
    if name == "merged":
        assert drafter.max_bytes == sum(part.max_bytes for part in drafter.drafters)
    assert 0 < drafter.bytes_used <= drafter.max_bytes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GIVEN])
def test_a_namespace_sees_nothing_of_another(makers, name):
    parts = makers[name]()
    drafter = parts
    if name == "merged":
        drafter = MergedDrafter([part for part in parts.drafters if part.name not in GIVEN])
    play(drafter, TEXT, "ours")
    assert len(guesses(drafter, "ours")[0]) > 1
    secret = set(TEXT) - set(TEXT[20:25]) - set(TEXT[3:9])
    assert not secret & set(guesses(drafter, "theirs")[0])


@all_of_them
def test_threads_share_it(makers, name):
    drafter, errors = makers[name](), []

    def work(seed):
        text = np.random.default_rng(seed).integers(0, 40, 30).tolist() * 5
        try:
            for _ in range(3):
                assert play(drafter, text, f"of {seed % 2}")[1] == text
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(guesses(drafter, "of 0")[0]) > 1 or name == "retrieval"


def test_the_helper_writes_the_text_whatever_is_guessed():
    class Nothing:
        def draft(self, contexts, budgets):
            return [DraftTree.root(int(context.tokens[-1])) for context in contexts]

    assert play(Nothing(), TEXT)[1] == TEXT
