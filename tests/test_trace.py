"""A trace changes nothing, tells everything, and is readable however it was cut short."""

from __future__ import annotations

import copy
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specdec
from specdec.policies import FixedPolicy
from specdec.recorder import Recorder
from specdec.spelling import pieces, spell
from specdec.statistics import SpecdecWarning
from specdec.trace import Generation, Step, Trace, read_trace
from specdec.traces import read
from specdec.verifiers.traced import BLOCK
from tests import tiny
from tests.tiny import Oracle, padded, prompt

POLICY = FixedPolicy(12, 5, 6)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.4},
    "processed": {"do_sample": False, "repetition_penalty": 1.3},
    "scores": {"do_sample": True, "return_dict_in_generate": True, "output_scores": True},
    "stopped": {"do_sample": False, "eos_token_id": [18, 35, 61]},  # one row ends amid a draft
}
PROMPTS: dict[str, dict[str, torch.Tensor]] = {
    "alone": {"input_ids": prompt()},
    "batch": padded(9, 5),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def run(model: Any, way: dict[str, Any], batch: dict[str, torch.Tensor], **parts: Any) -> tuple[Any, specdec.Stats]:
    """A seeded generation by an oracle of what it will write: tokens, random state and scores; and what it counted."""
    arguments = {**batch, "max_new_tokens": 20, "eos_token_id": None, **way}
    torch.manual_seed(3)
    known = tiny.texts(tiny.sequences(model.generate(**arguments)), batch.get("attention_mask"))
    # By torch's own layers: up to how many rows ours are used is measured, so that two runs might round differently.
    with specdec.speculating(model, Oracle(known), POLICY, on_unsupported="error", cpu_kernels=False, **parts):
        torch.manual_seed(3)
        output = model.generate(**arguments)
        result = [tiny.sequences(output), torch.get_rng_state(), *getattr(output, "scores", ())]
        return result, specdec.stats(model)


@pytest.mark.parametrize("batch", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_trace_changes_nothing_and_tells_the_text(model, way, batch, file):
    without, _ = run(model, way, batch)
    traced, stats = run(model, way, batch, trace=file)
    assert all(torch.equal(a, b) for a, b in zip(without, traced, strict=True))
    assert stats.accepted > 0
    (generation,) = read_trace(file).generations
    for row, whole in enumerate(tiny.texts(traced[0], batch.get("attention_mask"))):
        start, written = len(generation.prompts[row]), generation.output(row)
        assert whole[:start] == generation.prompts[row]
        assert whole[start:][: len(written)] == written
        assert set(whole[start:][len(written) :]) <= {0}  # padding after the end
        guessed = [drafter for step in generation.of_row(row) for drafter in step.guessed_by]
        assert guessed == stats.sources[row][: len(guessed)]
        assert "oracle" in guessed


def test_any_verifier_can_be_recorded(model, file):
    without, _ = run(model, WAYS["sampled"], PROMPTS["alone"], verifier="rejection")
    traced, stats = run(model, WAYS["sampled"], PROMPTS["alone"], verifier="rejection", trace=file)
    (generation,) = read_trace(file).generations
    assert all(torch.equal(a, b) for a, b in zip(without, traced, strict=True))
    assert generation.verifier == "RejectionVerifier"
    assert sum(len(step.committed) for step in generation.steps) == stats.tokens


def test_every_step_is_told_as_the_format_says(model, file):
    _, stats = run(model, WAYS["greedy"], PROMPTS["batch"], trace=Recorder(file, "a label"))
    header, opening, *steps, end = map(json.loads, file.read_text().splitlines())
    assert header == {"type": "trace", "version": 1, "specdec": specdec.__version__, "model": ""}
    said = {"drafter": "oracle", "policy": "FixedPolicy", "verifier": "PathwiseVerifier", "level": "tree"}
    assert said.items() <= opening.items()
    assert (opening["type"], opening["id"], opening["label"]) == ("generation", 0, "a label")
    keys = "type generation row tokens parents probability source path committed wanted wanted_probability seconds"
    assert all(set(step) - {"prompt"} == set(keys.split()) for step in steps)
    assert [step.get("prompt", False) for step in steps] == [True, True] + [False] * (len(steps) - 2)
    assert [(step["tokens"], step["path"]) for step in steps[:2]] == [([p[-1]], [0]) for p in opening["prompts"]]
    assert (end["type"], end["generation"]) == ("end", 0)
    assert len(steps) == stats.steps
    assert sum(len(step["tokens"]) - 1 for step in steps) == stats.drafted
    once = [step for step in steps if step["row"] == 0]  # what a step took stands in the line of each of its rows
    told = {part: sum(step["seconds"][part] for step in once) for part in ("draft", "verify", "walk", "cache")}
    spent = stats.seconds | {"verify": stats.seconds["verify"] + stats.seconds["prefill"]}
    assert all(0 < seconds < spent[part] + 1e-4 for part, seconds in told.items())  # told in microseconds
    assert sum(spent.values()) - spent["prefill"] < end["seconds"] + 1e-4


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_what_the_target_wanted_is_what_it_says_of_each_path(model, way, file):
    run(model, WAYS[way], PROMPTS["alone"], trace=file)
    (generation,) = read_trace(file).generations
    committed = list(generation.prompts[0])
    for step in generation.steps:
        for node in range(len(step.tokens)):
            law = model(torch.tensor([committed[:-1] + path(step, node)])).logits[0, -1].softmax(-1)
            best = law.topk(4)
            assert step.wanted[node] == best.indices.tolist()
            assert step.wanted_probability[node] == pytest.approx(best.values.tolist(), abs=1e-4)
        committed += step.committed
    assert any(len(step.path) > 2 for step in generation.steps)


def path(step: Step, node: int) -> list[int]:
    """The tokens from the root to a node."""
    return [*(path(step, step.parents[node]) if node else []), step.tokens[node]]


def test_drafters_are_shown_no_fewer_candidates_than_they_ask_for(model, file):
    shown = set()

    class Eager(Oracle):
        def draft(self, contexts, budgets):
            shown.update(context.verdict.candidates.shape[1] for context in contexts)
            return super().draft(contexts, budgets)

    with specdec.speculating(model, Eager(topk=7), POLICY, trace=file):
        model.generate(**PROMPTS["alone"], max_new_tokens=5)
    assert shown == {7}
    assert {len(wanted) for step in read_trace(file).generations[0].steps for wanted in step.wanted} == {4}


def test_without_a_trace_nothing_is_asked_for(model):
    seen = []

    class Watcher(Oracle):
        def draft(self, contexts, budgets):
            seen.extend(context.verdict for context in contexts)
            return super().draft(contexts, budgets)

    with specdec.speculating(model, Watcher(), POLICY):
        model.generate(**PROMPTS["alone"], max_new_tokens=5)
    assert seen
    assert all(verdict.candidates is None and verdict.likelihood is None for verdict in seen)


def test_a_custom_generate_records_too(model, file):
    loop = specdec.Speculate(Oracle(), POLICY, trace=file)
    model.generate(**PROMPTS["alone"], max_new_tokens=5, custom_generate=loop)
    assert len(read_trace(file).generations[0].output()) == 5


# Several generations, several writers.


def test_a_file_goes_on_where_it_ended(model, file):
    for n in range(3):
        run(model, WAYS["greedy"], PROMPTS["alone"], trace=Recorder(file, f"run {n}"))
    trace = read_trace(file)
    assert [(g.id, g.label) for g in trace.generations] == [(0, "run 0"), (1, "run 1"), (2, "run 2")]
    assert trace.generations[0].steps[0].tokens == trace.generations[2].steps[0].tokens
    assert [g.seconds is not None for g in trace.generations] == [True] * 3


def test_recorders_of_one_file_take_turns(file, monkeypatch):
    look = Recorder._look  # slower than it is, so that others may come between
    monkeypatch.setattr(Recorder, "_look", lambda self: (look(self), time.sleep(0.002)))
    recorders = [Recorder(file), Recorder(file)]
    lines = [{"type": "end", "generation": 0, "seconds": 1.0}] * BLOCK

    def write(n: int) -> int:
        number = recorders[n % 2].begin("m", {"prompts": [[n]]})
        recorders[n % 2].write(lines)
        return number

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(write, range(40)))
    assert sorted(numbers) == list(range(40))
    assert {g.id: g.prompts for g in read_trace(file).generations} == {i: [[n]] for n, i in enumerate(numbers)}
    assert file.read_text().count('"trace"') == 1


def test_a_file_that_was_taken_away_is_made_anew(model, file):
    recorder = Recorder(file)
    for _ in range(2):
        run(model, WAYS["greedy"], PROMPTS["alone"], trace=recorder)
        assert [g.id for g in read_trace(file).generations] == [0]
        file.unlink()


# What is cut short.


class BrokenOffError(Exception):
    """Stands for whatever stops a generation."""


class Streamer:
    """Fails when it is given its 30th token."""

    def __init__(self) -> None:
        self.left = 30

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise BrokenOffError

    def end(self) -> None:
        pass


def test_what_was_written_before_a_generation_broke_off_is_there(model, file):
    with specdec.speculating(model, Oracle(), POLICY, trace=file), pytest.raises(BrokenOffError):
        model.generate(**PROMPTS["alone"], max_new_tokens=40, eos_token_id=None, streamer=Streamer())
    (generation,) = read_trace(file).generations
    assert generation.seconds is None
    assert len(generation.steps) == BLOCK
    run(model, WAYS["greedy"], PROMPTS["alone"], trace=file)
    assert [g.id for g in read_trace(file).generations] == [0, 1]


def test_a_cut_last_line_is_left_out_and_does_not_spoil_the_next(model, file):
    run(model, WAYS["greedy"], PROMPTS["alone"], trace=file)
    whole = file.read_bytes()
    steps = len(read_trace(file).generations[0].steps)
    file.write_bytes(whole[:-9])  # amid the last line, the end's
    assert len(read_trace(file).generations[0].steps) == steps
    file.write_bytes(whole[: whole.index(b'"end"') - 50])  # amid the last step
    assert len(read_trace(file).generations[0].steps) == steps - 1
    run(model, WAYS["greedy"], PROMPTS["alone"], trace=file)
    assert [len(g.steps) for g in read_trace(file).generations] == [steps - 1, steps]


def test_a_full_disk_ends_the_trace_and_not_the_text(model, file, monkeypatch):
    (wanted, *_), _ = run(model, WAYS["greedy"], PROMPTS["alone"])

    def full(self, lines):
        raise OSError("no space left")

    monkeypatch.setattr(Recorder, "write", full)
    with pytest.warns(SpecdecWarning, match="a trace is cut, as it could not be written: no space left"):
        (tokens, *_), stats = run(model, WAYS["greedy"], PROMPTS["alone"], trace=file)
    assert torch.equal(tokens, wanted)
    assert len(stats.reasons) == 1


# What cannot be recorded, or read.


def test_a_file_that_cannot_be_written_is_told_at_once(model, tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path, tmp_path / "file" / "trace.jsonl", tmp_path / "missing" / "trace.jsonl"):
        with pytest.raises(OSError, match=str(where.name)):
            specdec.wrap(model, trace=where)
        assert "generate" not in vars(model)


@pytest.mark.parametrize("content", ["precious", "precious\nnotes\n", '{"type": "trace", "version": 2}\n'])
def test_a_file_of_another_kind_is_left_as_it_is(model, file, content):
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}, line 1: "):
        specdec.wrap(model, trace=file)
    assert file.read_text() == content


HEADER = '{"type": "trace", "version": 1, "specdec": "0.1.0", "model": "m"}\n'
OPENING = '{"type": "generation", "id": 7, "prompts": [[1, 2]], "later": "key"}\n'
STEP = {
    "type": "step", "generation": 7, "row": 0, "tokens": [2, 5], "parents": [-1, 0], "probability": [1.0, 0.5],
    "source": ["", "a"], "path": [0, 1], "committed": [5, 6], "wanted": [[5], [6]], "wanted_probability": [[1], [1]],
    "seconds": {"draft": 0, "verify": 0, "walk": 0, "cache": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": not a trace"),
        ('{"session": "s"}\n', ", line 1: not a trace"),
        ('{"type": "trace", "version": 2}\n', ", line 1: a trace of version 2; this program reads 1"),
        (HEADER + "garbage\n" + OPENING, ", line 2: damaged"),
        (HEADER + OPENING + json.dumps(STEP | {"generation": 8}) + "\n", ", line 3: damaged"),
        (HEADER + OPENING + json.dumps(STEP | {"parents": [-1, 1]}) + "\n", ", line 3: .*before its parent"),
        (HEADER + OPENING + json.dumps(STEP | {"path": [0, 2]}) + "\n", ", line 3: .*leaves the tree"),
        (HEADER + OPENING + json.dumps(STEP | {"source": [""]}) + "\n", ", line 3: .*2 nodes"),
        (HEADER + OPENING + json.dumps({**STEP, "tokens": None}) + "\n", ", line 3: damaged"),
    ],
)
def test_what_is_no_trace_is_told_with_file_and_line(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{file}{message}"):
        read_trace(file)


def test_kinds_of_lines_and_keys_of_later_programs_are_passed_over(file):
    file.write_text(HEADER + '{"type": "weather"}\n' + OPENING + "\n" + json.dumps({**STEP, "mood": 1}) + "\n")
    (generation,) = read_trace(file).generations
    assert generation.id == 7
    assert generation.steps[0].guessed_by == ["a", ""]


# Copies.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_not_record(file, copied):
    model = tiny.model()
    specdec.wrap(model, "ngram", trace=file)
    twin = copied(model)
    twin.generate(**PROMPTS["alone"], max_new_tokens=5)
    assert specdec.stats(twin).tokens == 5
    assert file.read_text() == ""
    model.generate(**PROMPTS["alone"], max_new_tokens=5)
    assert len(read_trace(file).generations) == 1


# Texts.


def byte_level() -> Any:
    """A token for every byte."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> Any:
    """Words that keep the space before them, and bytes for what is no word, as SentencePiece has them."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEXT = "naïve 日本 🎉🎊 end."


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_spell_the_text_and_characters_come_whole(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    found = pieces(ids, *spell(tokenizer, set(ids)))
    assert "".join(found).lstrip() == tokenizer.decode(ids) == TEXT  # the first word's space is not of the text
    assert "🎉" in found
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_half_a_character_is_one_replacement(make):
    tokenizer = make()
    ids = tokenizer.encode("x🎉")[:-1]
    assert "".join(pieces(ids, *spell(tokenizer, ids))).strip() == "x\N{REPLACEMENT CHARACTER}"


def test_a_word_keeps_the_space_before_it():
    tokenizer = byte_fallback()
    (word,) = tokenizer.convert_tokens_to_ids(["▁the"])
    assert spell(tokenizer, [word])[0] == {word: " the"}


def test_texts_are_written_once_and_read_back(model, file):
    recorder = Recorder(file, tokenizer=byte_level())
    for _ in range(2):
        run(model, WAYS["greedy"], PROMPTS["alone"], trace=recorder)
    assert file.read_text().count('"texts"') == 2  # one line has its kind and its key
    trace = read_trace(file)
    steps = trace.generations[0].steps
    spelt = {token for step in steps for token in [*step.tokens, *(id for each in step.wanted for id in each)]}
    assert spelt <= set(trace.texts)
    silent = Trace(trace.model, trace.specdec, trace.generations).with_texts(byte_level())
    assert (silent.texts, silent.parts) == (trace.texts, trace.parts)
    ids = byte_level().encode("ï")
    assert Trace("", "", [], *spell(byte_level(), ids)).text(ids[0]) == "\\xc3"
    assert Trace("", "").text(5) == "<5>"


@pytest.mark.real
def test_the_demo_tokenizers_texts_are_exact(demo_tokenizer):
    ids = demo_tokenizer.encode(TEXT + "\n\t def f():  <|im_end|>")
    assert "".join(pieces(ids, *spell(demo_tokenizer, ids))) == demo_tokenizer.decode(ids)


@pytest.fixture
def demo_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from specdec.demo import demo_path

    return AutoTokenizer.from_pretrained(demo_path())


# Replay.


def test_a_trace_is_a_recording_of_answers(model, file):
    run(model, WAYS["stopped"], PROMPTS["batch"], trace=Recorder(file, "chat"))
    run(model, WAYS["sampled"], PROMPTS["alone"], trace=file)
    first, second = read_trace(file).generations
    responses = list(read(file, None))
    assert [r.prompt.tolist() for r in responses] == [*first.prompts, *second.prompts]
    assert [r.tokens.tolist() for r in responses] == [first.output(0), first.output(1), second.output(0)]
    assert [r.session for r in responses] == ["chat", "chat", f"{file}, generation 1, row 0"]
    assert {r.namespace for r in responses} == {str(file)}


def test_answers_without_tokens_are_passed_over(file):
    empty = Generation(8, [[]])
    assert empty.output() == []
    file.write_text(HEADER + OPENING + OPENING.replace("7", "8").replace("[1, 2]", "[]"))
    assert list(read(file, None)) == []
