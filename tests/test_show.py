"""``specdec show`` on a trace written by hand: what was guessed, what came of it, and what the target wanted."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import specdec
from specdec import cli
from specdec.commands import console
from specdec.recorder import Recorder
from specdec.trace import read_trace
from tests import tiny

TEXTS = {"1": "def", "2": " add", "3": "(", "4": "a", "5": "\n", "6": " sub", "7": "naï", "8": "x"}
SECONDS = {"draft": 0.001, "verify": 0.02, "walk": 0.0, "cache": 0.0}


def step(generation: int = 0, row: int = 0, **changes: Any) -> dict[str, Any]:
    """A step whose tree is add((a|8), sub; the target took add, ( and then a new line."""
    return {
        "type": "step", "generation": generation, "row": row,
        "tokens": [1, 2, 6, 3, 4, 8], "parents": [-1, 0, 0, 1, 3, 3],
        "probability": [1, 0.5, 0.25, 0.4, 0.3, 0.1], "source": ["", "suffix", "ngram", "suffix", "suffix", "suffix"],
        "path": [0, 1, 3], "committed": [2, 3, 5],
        "wanted": [[2, 6], [3], [], [5, 7, 4], [], []],
        "wanted_probability": [[0.9, 0.05], [1], [], [0.7, 0.2, 0.1], [], []],
        "seconds": SECONDS, **changes,
    }  # fmt: skip


FIRST = {
    "tokens": [8],
    "parents": [-1],
    "probability": [1],
    "source": [""],
    "path": [0],
    "committed": [1],
    "wanted": [[1]],
}
FIRST |= {"wanted_probability": [[1]], "prompt": True}


def write(path: Path, *lines: dict[str, Any], texts: bool = True) -> Path:
    header = {"type": "trace", "version": 1, "specdec": "0.1.0", "model": "m"}
    told = [{"type": "texts", "texts": TEXTS}] if texts else []
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines, *told]))
    return path


def opening(id: int = 0, rows: int = 1) -> dict[str, Any]:
    names = {"drafter": "merged", "policy": "ThroughputPolicy", "verifier": "PathwiseVerifier", "level": "tree"}
    return {"type": "generation", "id": id, "prompts": [[8]] * rows, "label": f"chat/{id}", **names}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One generation of two steps."""
    end = {"type": "end", "generation": 0, "seconds": 0.5}
    return write(tmp_path / "one.jsonl", opening(), step(**FIRST), step(), end)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A whole generation of one row, and one of two rows that was cut short."""
    second = [step(3, row, **FIRST) for row in (0, 1)] + [step(3, 1)]
    end = {"type": "end", "generation": 0, "seconds": 0.5}
    return write(tmp_path / "several.jsonl", opening(), step(**FIRST), end, opening(3, 2), *second)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["show", *map(str, arguments)], catch_exceptions=False)


def test_a_steps_tree(one):
    result = invoke(one, "--step", 1)
    assert result.exit_code == 0
    heading, *lines = result.stdout.splitlines()
    assert heading == "step 1: 5 drafted, 2 accepted; draft 1.0 ms, verify 20.0 ms, walk 0.0 ms, cache 0.0 ms"
    assert [line.rstrip() for line in lines[:8]] == [
        "def",
        "├── ␣add  0.50 → 0.90 ✓",
        "│   └── (  0.40 → 1.00 ✓",
        "│       ├── a  0.30 → 0.10",
        "│       ├── x  0.10",
        "│       ├── \\n → 0.70 +",
        "│       └── naï → 0.20 ○",
        "└── ␣sub  0.25 → 0.05",
    ]
    assert "suffix 50%" in result.stdout


def test_the_prompts_pass_has_no_guesses(one):
    lines = [line.rstrip() for line in invoke(one, "--step", 0).stdout.splitlines()]
    assert lines[1:3] == ["x", "└── def → 1.00 +"]


def test_a_summary_has_the_text_and_a_line_for_each_step(one):
    lines = [line.rstrip() for line in invoke(one).stdout.splitlines()]
    assert lines[:4] == ["chat/0", "merged · ThroughputPolicy · PathwiseVerifier · tree · 0.50 s", "def add(", ""]
    assert [line.split() for line in lines[5:7]] == [
        ["0", "0", "0", "1.0", "20.0", "def"],
        ["1", "5", "2", "1.0", "20.0", "␣add·(·\\n"],
    ]
    assert lines[-1] == "target 50%  suffix 50%"


def test_tokens_have_the_colours_of_their_drafters(one, monkeypatch):
    monkeypatch.setattr(console, "output", Console(force_terminal=True, color_system="standard"))
    assert "def\x1b[32m add\x1b[0m\x1b[32m(\x1b[0m" in invoke(one).stdout
    tree = invoke(one, "--step", 1).stdout
    assert re.search(r"\x1b\[1;32m␣add", tree), "accepted: bold, in the colour of the text"
    assert re.search(r"\x1b\[36m␣sub", tree), "rejected: in the next drafter's colour"


def test_several_generations_are_listed(several):
    lines = [line.split() for line in invoke(several).stdout.splitlines()]
    assert lines[1] == ["0", "chat/0", "merged", "1", "1", "1", "1.00", "0.50", "s"]
    assert lines[2] == ["3", "chat/3", "merged", "2", "5", "3", "1.67", "cut", "short"]


def test_rows_are_told_apart(several):
    result = invoke(several, "--generation", 3)
    assert [line for line in result.stdout.splitlines() if line.startswith("row")] == ["row 0", "row 1"]
    assert invoke(several, "--generation", 3, "--step", 2).stdout.startswith("step 2 of row 1: 5 drafted, 2 accepted;")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", 1], "--step needs --generation: there are 2"),
        (["--generation", 1], "--generation 1: the trace has 0, 3"),
        (["--generation", 3, "--step", 3], "--step 3: generation 3 has the steps 0 to 2"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(several, arguments, said):
    result = invoke(several, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_files_that_cannot_be_shown_are_told_in_a_line(tmp_path):
    (tmp_path / "text").write_text("text\n")
    for path, said in [
        (tmp_path / "missing", "missing"),
        (tmp_path / "text", "line 1: not a trace"),
        (write(tmp_path / "empty"), "no generation"),
    ]:
        result = invoke(path)
        assert (result.exit_code, result.stderr.startswith("error: "), said in result.stderr) == (1, True, True)


def test_without_texts_tokens_are_ids_and_a_tokenizer_spells_them(tmp_path, monkeypatch):
    class Letters:
        def encode(self, text, add_special_tokens):
            return [0]

        def decode(self, ids, clean_up_tokenization_spaces):
            return "".join(chr(97 + id) for id in ids)

    path = write(tmp_path / "bare.jsonl", opening(), step(**FIRST), step(), texts=False)
    assert "<1><2><3><5>" in invoke(path).stdout
    monkeypatch.setattr(console, "load_tokenizer", lambda where: Letters())
    assert "bcdf\n" in invoke(path, "--tokenizer", "letters").stdout


def test_control_characters_never_reach_the_terminal(tmp_path):
    bad = {"type": "texts", "texts": {"1": "\x1b[31m[b]"}}
    path = write(tmp_path / "bad.jsonl", {**opening(), "label": "\x1b[5m"}, step(**FIRST), bad, texts=False)
    assert "\\x1b[31m[b]" in invoke(path, "--step", 0).stdout
    assert "\x1b" not in invoke(path).stdout


def test_html_writes_the_page(one, tmp_path, monkeypatch):
    page, written = importlib.import_module("specdec.page.page"), {}
    monkeypatch.setattr(page, "write_page", lambda path, report=None, trace=None: written.update({path: trace}))
    assert invoke(one, "--html", tmp_path / "out.html").exit_code == 0
    assert len(written[tmp_path / "out.html"].generations) == 1


def test_a_recorded_generation_can_be_shown(tmp_path):
    recorder = Recorder(tmp_path / "trace.jsonl", tokenizer=tiny.tokenizer())
    with specdec.speculating(tiny.model(), "ngram", trace=recorder) as model:
        output = model.generate(tiny.prompt(), max_new_tokens=12, eos_token_id=None, do_sample=False)
    text = tiny.tokenizer().decode(output[0, 9:], clean_up_tokenization_spaces=False)
    assert text in invoke(tmp_path / "trace.jsonl").stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer on disk."""
    where = tmp_path_factory.mktemp("tiny")
    tiny.model().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_what_generate_records_can_be_shown_and_replayed(directory, tmp_path):
    path, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    asked = ("generate", "abcabcabc", "--model", directory, "--max-new-tokens", 20, "--drafter", "ngram")
    text = command(*asked, "--trace", path).stdout
    assert text == command(*asked).stdout
    assert text.removesuffix("\n") in invoke(path).stdout  # which shows the token that ends it too
    assert command("replay", path, "--drafters", "ngram", "--json", out).exit_code == 0
    (row,) = json.loads(out.read_text())["results"]
    assert (row["sessions"], row["tokens"]) == (1, len(read_trace(path).generations[0].output()))
    assert row["by_session"][0]["session"] == "abcabcabc"


def test_generate_without_a_drafter_has_nothing_to_record(directory, tmp_path):
    path = tmp_path / "trace.jsonl"
    result = command("generate", "a", "--model", directory, "--drafter", "none", "--trace", path)
    assert (result.exit_code, path.exists()) == (1, False)
    assert "--trace records drafts" in result.stderr
