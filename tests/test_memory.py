"""A memory shared by sessions: bounded, apart by namespace, kept in a file, merged, warmed, and safe in threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from specdec import Memory, Session
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import LookaheadDrafter, MergedDrafter, NgramDrafter, RecyclingDrafter, SuffixDrafter
from specdec.memory import NOTHING
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import prompt

POLICY = FixedPolicy(12, 5, 6)
BUDGET = Budget(32, 8, 8)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}!{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SONG = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


_unhurried = pytest.fixture(autouse=True, scope="module")(tiny.unhurried)


def guesses(memory: Memory, start: list[int], namespace: str = "") -> set[int]:
    """Every token that is guessed after a text, by all drafters."""
    found = set[int]()
    parts = memory.drafter.drafters if isinstance(memory.drafter, MergedDrafter) else (memory.drafter,)
    for part in parts:  # the union may leave out what a part guesses
        (tree,) = part.draft([Context(start, namespace)], [BUDGET])
        found |= set(tree.tokens[1:].tolist())
    return found


def write(memory: Memory, tokens: list[int], namespace: str = "", first: int = 2) -> None:
    """A generation as a decoder shows it: candidates at every node, and the end."""
    context = Context(tokens[:first], namespace)
    for token in tokens[first:]:
        memory.draft([context], [BUDGET])
        root = DraftTree.root(int(context.tokens[-1]))
        candidates = np.array([[token, *range(30, 30 + memory.topk - 1)]]) if memory.topk else None
        context.extend(Verdict(root, np.zeros(1, np.int64), np.array([token]), candidates))
    context.finished = True
    memory.draft([context], [NOTHING])


def test_sessions_learn_from_one_another() -> None:
    model, memory = tiny.model(), Memory()
    accepted = []
    for _ in range(2):
        with Session(model, memory=memory, policy=POLICY, cpu_kernels=False) as session:
            session.generate(prompt(9), max_new_tokens=40, eos_token_id=None)
            accepted.append(session.stats.accepted)
    assert accepted[1] > accepted[0] + 10
    assert memory.namespaces == [""]
    assert memory.bytes_used > 0


@pytest.mark.parametrize("drafter", ["auto", "suffix", "lookahead", "recycling"])
def test_a_namespace_sees_nothing_of_another(drafter: str) -> None:
    """Canaries: what one tenant wrote is never guessed for another, however the memory was handled since."""
    memory = Memory(drafter=drafter)
    write(memory, [*SONG, *SONG], "a")
    write(memory, [*range(60, 80)] * 2, "b")
    assert guesses(memory, SONG[:3], "a") & {8}
    for namespace in ("b", "", "a ", "a\0adapter"):
        assert not guesses(memory, SONG[:3], namespace) & set(SONG[3:]), namespace
    memory.forget("a")
    assert not guesses(memory, SONG[:3], "a") & set(SONG[3:])
    assert guesses(memory, [60, 61], "b") & {62}
    memory.forget()
    assert not guesses(memory, [60, 61], "b") & {62}
    assert memory.namespaces == []


def test_what_a_session_wrote_is_guessed_in_its_own_namespace_alone() -> None:
    model, memory = tiny.model(), Memory()
    with Session(model, memory=memory, namespace="other", policy=POLICY, cpu_kernels=False) as other:
        written = other.generate(prompt(9), max_new_tokens=40, eos_token_id=None)[0].tolist()
    assert not any(guesses(memory, written[n : n + 2], "mine") for n in range(40))
    assert all(written[n + 2] in guesses(memory, written[n : n + 2], "other") for n in range(10, 40))


def test_the_cap_holds_over_all_namespaces() -> None:
    memory, rng = Memory(max_bytes=4 << 20), np.random.default_rng(0)
    for n in range(40):
        memory.warm([rng.integers(0, 1000, 4000)], namespace=str(n % 20))
        assert memory.bytes_used <= 4 << 20
    assert 1 <= len(memory.namespaces) < 20
    assert memory.namespaces[-1] == "19"
    one = rng.integers(0, 1000, 4000).tolist()
    memory.warm([one], namespace="19")
    assert guesses(memory, one[:5], "19") & {one[5]}


def test_one_namespace_larger_than_the_cap_keeps_its_newest() -> None:
    memory, rng = Memory(max_bytes=4 << 20), np.random.default_rng(0)
    for _ in range(20):
        last = rng.integers(0, 1000, 4000).tolist()
        memory.warm([last])
        assert memory.bytes_used <= 4 << 20
    assert memory.namespaces == [""]
    assert guesses(memory, last[:5]) & {last[5]}


def test_the_least_recently_used_namespace_goes_first() -> None:
    memory = Memory(namespaces=2)
    for namespace in ("a", "b", "a", "c"):
        memory.warm([SONG], namespace=namespace)
    assert memory.namespaces == ["a", "c"]
    assert not guesses(memory, SONG[:3], "b")


@pytest.mark.parametrize("drafter", ["auto", "suffix", "lookahead", "recycling"])
def test_what_is_saved_is_loaded(drafter: str, tmp_path: Any) -> None:
    memory = Memory(drafter=drafter)
    for namespace in ("a", "b"):
        write(memory, [*SONG, *SONG], namespace)
    write(memory, SONG, "a")
    memory.save(tmp_path / "memory")
    again = Memory(drafter=drafter)
    write(again, [70, 71, 72, 73], "c")
    again.load(tmp_path / "memory")
    assert again.namespaces == ["b", "a"]
    assert guesses(again, SONG[:3], "a") == guesses(memory, SONG[:3], "a") != set()
    assert not guesses(again, [70, 71], "c")


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Any) -> None:
    memory, path = Memory(), tmp_path / "memory"
    memory.warm([SONG])
    Memory(drafter="suffix").save(path)
    with pytest.raises(ValueError, match="suffix"):
        memory.load(path)
    memory.save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        memory.load(path)
    with pytest.raises(FileNotFoundError):
        memory.load(tmp_path / "none")
    assert guesses(memory, SONG[:3]) & {8}
    for use in (Memory(drafter="ngram").save, Memory(drafter="ngram").load):
        with pytest.raises(TypeError, match="ngram learns nothing"):
            use(path)


def test_merging_is_a_union() -> None:
    ours, theirs, both = Memory(), Memory(), Memory()
    mine, more = list(range(5, 25)), list(range(40, 60))
    other = list(range(70, 90))
    for memory, texts in ((ours, [mine]), (theirs, [mine, more]), (both, [mine, more])):
        for text in texts:
            write(memory, text)
    theirs.warm([other], namespace="b")
    assert ours.merge(theirs) == ()
    for start in (mine[4:8], more[4:8]):
        assert guesses(ours, start) >= guesses(both, start) - set(range(30, 38)) != set()
    assert guesses(ours, other[3:6], "b") & {other[6]}
    assert not guesses(ours, other[3:6]) & set(other)
    assert sorted(ours.namespaces) == ["", "b"]
    size, again = ours.bytes_used, ours.merge(theirs)
    assert (ours.bytes_used, again) == (size, ())


def test_what_cannot_be_merged_is_said() -> None:
    def made(*drafters: Any) -> Memory:
        return Memory(drafter=MergedDrafter(drafters))

    tries = made(NgramDrafter(), LookaheadDrafter(), RecyclingDrafter())
    write(tries, [*SONG, *SONG])
    assert made(LookaheadDrafter()).merge(tries) == ("lookahead", "recycling")
    assert made(LookaheadDrafter(), RecyclingDrafter()).merge(tries) == ("lookahead",)
    assert made(SuffixDrafter(), LookaheadDrafter()).merge(Memory()) == ("recycling",)
    with pytest.raises(ValueError, match="candidates"):
        made(RecyclingDrafter(k=3)).merge(tries)


def test_recycled_candidates_are_taken_over_where_none_are_known() -> None:
    ours, theirs = Memory(drafter="recycling"), Memory(drafter="recycling")
    write(ours, [5, 5, 50])
    write(theirs, [5, 5, 60])
    write(theirs, [7, 7, 70])
    ours.merge(theirs)
    assert 50 in guesses(ours, [5])
    assert 60 not in guesses(ours, [5])
    assert 70 in guesses(ours, [7])


def test_warming() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.encode("stitch in time", add_special_tokens=False)
    say = [
        {"role": "user", "content": "secret question"},
        {"role": "assistant", "content": "stitch in time"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "saves nine"},
    ]
    for texts in (["stitch in time"], [ids], [np.array(ids)], [torch.tensor(ids)], [say]):
        memory = Memory()
        tokens = memory.warm(texts, tokenizer, "mine")
        assert guesses(memory, ids[:4], "mine") & {ids[4]}
        assert tokens == (len(ids) if texts[0] is not say else len("stitch in time!saves nine!"))
    assert not guesses(memory, tokenizer.encode("secret ques", add_special_tokens=False), "mine") & {
        tokenizer.encode("t", add_special_tokens=False)[0]
    } - set(ids)
    assert guesses(memory, tokenizer.encode("nine", add_special_tokens=False), "mine")
    with pytest.raises(ValueError, match="need a tokenizer"):
        memory.warm(["text"])
    for wrong in ([[0.5]], [[[1], [2]]], [[-1]]):
        with pytest.raises(ValueError, match="rows of token ids"):
            memory.warm(wrong)


def test_a_long_text_is_learnt_to_its_end() -> None:
    memory, text = Memory(), np.random.default_rng(0).integers(0, 1000, 10_000).tolist()
    assert memory.warm([text]) == 10_000
    for start in (100, 5000, 9000):
        assert guesses(memory, text[start : start + 5]) & {text[start + 5]}


def test_what_makes_no_sense_is_refused() -> None:
    for arguments in ({"max_bytes": 1000}, {"namespaces": 0}, {"drafter": "none"}):
        with pytest.raises(ValueError, match=r"max_bytes|drafter"):
            Memory(**arguments)


def test_sessions_in_threads_share_a_memory(tmp_path: Any) -> None:
    """Eight sessions of two namespaces write the same texts as alone, while others save, load, merge and forget."""
    model, memory, errors = tiny.model(), Memory(max_bytes=2 << 20, namespaces=2), list[BaseException]()
    starts = [prompt(9, seed=n) for n in range(4)]
    plain = [model.generate(ids, max_new_tokens=20, eos_token_id=None).tolist() for ids in starts]
    stop = threading.Event()

    def work(n: int) -> None:
        with Session(model, memory=memory, namespace="ab"[n % 2], policy=POLICY, cpu_kernels=False) as session:
            for turn in range(4):
                which = (n + turn) % 4
                written = session.generate(starts[which], max_new_tokens=20, eos_token_id=None)
                assert written.tolist() == plain[which]

    def disturb() -> None:
        while not stop.is_set():
            memory.save(tmp_path / "memory")
            other = Memory()
            other.load(tmp_path / "memory")
            memory.merge(other)
            memory.load(tmp_path / "memory")
            memory.forget("a")

    def guarded(run: Any, *arguments: Any) -> None:
        try:
            run(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work, n)) for n in range(8)]
    other = threading.Thread(target=guarded, args=(disturb,))
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert errors == []
    assert set(memory.namespaces) <= {"a", "b"}


READER = """
import sys
from specdec import Memory
memory = Memory(drafter="suffix")
print("ready", flush=True)
seen = set()
while "4" not in seen:
    memory.load(sys.argv[1])
    assert len(memory.namespaces) == 1, memory.namespaces
    seen.update(memory.namespaces)
print("done")
"""


def test_one_process_writes_while_another_reads(tmp_path: Any) -> None:
    path = tmp_path / "memory"
    Memory(drafter="suffix").warm([SONG])
    first = Memory(drafter="suffix")
    first.warm([SONG], namespace="0")
    first.save(path)
    reader = subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for n in range(1, 5):
            memory = Memory(drafter="suffix")
            memory.warm([list(range(1000))] * 3, namespace=str(n))
            for _ in range(5):
                memory.save(path)
        assert reader.stdout.readline() == "done\n"
        assert reader.wait(300) == 0
    finally:
        reader.kill()
        reader.wait()
