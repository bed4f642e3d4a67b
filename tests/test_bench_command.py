"""``specdec bench`` on a tiny model: files come out, it goes on after an interrupt, mistakes are told in a line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from specdec import cli
from specdec.bench import compare, run, workloads
from specdec.bench.disturbance import Disturbance
from tests import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random Llama and a tokenizer of letters."""
    path = tmp_path_factory.mktemp("model")
    tiny.model(eos_token_id=None, max_position_embeddings=2048).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "ababab", "workload": "letters"}\n{"turns": ["1212", "34"], "workload": "digits"}\n')
    return path


@pytest.fixture
def quiet(monkeypatch):
    """A machine that nothing disturbs, whatever else runs on it while it is tested."""
    monkeypatch.setattr(compare, "Disturbance", lambda: Disturbance(load=lambda: 0.004, busy=lambda: None))


def bench(directory, *arguments):
    return CliRunner().invoke(cli.app, ["bench", "--model", directory, *map(str, arguments)])


def test_it_writes_its_figures(directory, asked, tmp_path, quiet):
    out, trace = tmp_path / "out.json", tmp_path / "trace.jsonl"
    trace.write_text("something of before")
    arguments = ("--methods", "ngram,recycling@fixed:4:2:2,prompt-lookup", "--questions", asked, "--repeats", 2)
    result = bench(directory, *arguments, "--max-new-tokens", 8, "--json", out, "--trace", trace)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    methods = ("plain", "ngram", "recycling@fixed:4:2:2", "prompt-lookup")
    assert {(r["workload"], r["method"]) for r in report["results"]} == {
        (w, m) for w in ("letters", "digits", "all") for m in methods
    }
    assert all(r["equal"] and r["speedup"] for r in report["results"])
    assert sum(r["prompts"] for r in report["results"] if r["method"] == "ngram" and r["workload"] == "digits") == 2
    assert (report["version"], report["machine"]["model"], report["repeats"]) == (2, directory, 2)
    assert report["overhead"]["nodes"] == 64
    assert [cost["kernels"] for cost in report["pass_cost"]] == [False, True]
    assert [q["prompt"] for q in report["questions"]] == ["ababab", "1212", "34"]
    assert "prompt-lookup" in result.stdout
    from specdec.trace import read_trace

    traced = read_trace(trace).generations
    assert [generation.label.split("/")[0] for generation in traced] == ["letters", "digits"]
    kept = [json.loads(line)["type"] for line in (tmp_path / "out.json.runs.jsonl").read_text().splitlines()]
    assert (kept.count("run"), kept[-1]) == (3 * 4 * 2, "done")


def test_it_writes_a_page(directory, asked, tmp_path, quiet):
    pytest.importorskip("matplotlib", reason="draws the page's plots")
    page = tmp_path / "out.html"
    arguments = ("--methods", "ngram", "--questions", asked, "--repeats", 1, "--max-new-tokens", 8)
    result = bench(directory, *arguments, "--html", page, "--trace", tmp_path / "trace.jsonl")
    assert result.exit_code == 0, result.output
    assert "ngram" in page.read_text()
    noisy = bench(directory, *arguments, "--html", page)  # without a trace
    assert noisy.exit_code == 0, noisy.output


def test_it_goes_on_after_an_interrupt(directory, asked, tmp_path, quiet, monkeypatch):
    out, measured = tmp_path / "out.json", []
    arguments = ("--methods", "ngram,recycling", "--questions", asked, "--repeats", 1, "--json", out)
    measure, stop = run.measure, [5]

    def counted(method, ids, max_new_tokens):
        if max_new_tokens == 8 and stop and len(measured) == stop[0]:
            raise KeyboardInterrupt
        got = measure(method, ids, max_new_tokens)
        if max_new_tokens == 8:
            measured.append((method.name, tuple(ids)))
        return got

    encoded = 1  # the answer between two turns is measured as well
    monkeypatch.setattr(run, "measure", counted)
    result = bench(directory, *arguments, "--max-new-tokens", 8)
    assert result.exit_code == 130
    assert "the same command goes on with what" in result.stderr
    assert not out.exists()
    other = bench(directory, *arguments, "--max-new-tokens", 9)
    assert (other.exit_code, "max_new_tokens was 8 and is now 9" in other.stderr) == (1, True)
    stop.clear()
    result = bench(directory, *arguments, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert len(measured) == encoded + 3 * 3
    assert all(r["equal"] for r in json.loads(out.read_text())["results"])
    result = bench(directory, *arguments, "--max-new-tokens", 8, "--fresh")
    assert len(measured) == 2 * (encoded + 3 * 3)


def test_without_a_file_an_interrupt_says_what_would_keep_runs(directory, asked, monkeypatch):
    monkeypatch.setattr(run.Comparison, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = bench(directory, "--questions", asked, "--max-new-tokens", 2)
    assert (result.exit_code, "--json or --runs would keep" in result.stderr) == (130, True)


def test_it_refuses_to_tell_speeds_when_disturbed(directory, asked, tmp_path, monkeypatch):
    out, seconds = tmp_path / "out.json", iter([0.004, 0.004, 0.008] * 2)
    monkeypatch.setattr(compare, "Disturbance", lambda: Disturbance(load=lambda: next(seconds), busy=lambda: None))
    arguments = ("--methods", "ngram", "--questions", asked, "--repeats", 1, "--max-new-tokens", 4, "--json", out)
    result = bench(directory, *arguments)
    assert result.exit_code == 1
    assert "no speeds: other load disturbed the run" in result.stdout
    report = json.loads(out.read_text())
    assert (report["disturbance"]["refused"], report["overhead"], report["pass_cost"]) == (True, None, [])
    assert all(r["speedup"] is None for r in report["results"])
    result = bench(directory, *arguments, "--allow-disturbed")
    assert result.exit_code == 0
    assert "DISTURBED by other load" in result.stdout
    assert all(r["speedup"] for r in json.loads(out.read_text())["results"])


def test_it_keeps_to_the_workloads_asked_for_and_is_quick(directory, tmp_path, quiet, monkeypatch):
    whole = workloads.own
    monkeypatch.setattr(
        workloads,
        "own",
        lambda names=(): [
            replace(p, messages=({"role": "user", "content": p.messages[-1]["content"][:16]},)) for p in whole(names)
        ],
    )
    out = tmp_path / "out.json"
    arguments = ("--methods", "auto", "--quick", "--json", out)
    assert bench(directory, *arguments, "--workloads", "sql,chat").exit_code == 0
    report = json.loads(out.read_text())
    assert {(r["workload"], r["prompts"]) for r in report["results"]} == {("sql", 1), ("chat", 1), ("all", 2)}
    assert (report["max_new_tokens"], report["repeats"]) == (32, 1)
    assert bench(directory, *arguments).exit_code == 0
    assert len(json.loads(out.read_text())["questions"]) == 6
    arguments = ("--methods", "ngram", "--workloads", "sql", "--prompts-per-workload", 2, "--max-new-tokens", 4)
    assert bench(directory, *arguments, "--repeats", 1, "--json", out).exit_code == 0
    assert len(json.loads(out.read_text())["questions"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "fast"], "no method named 'fast'"),
        (["--methods", "ngram@fixed:x"], "give fixed:NODES"),
        (["--methods", "nowhere:Drafter"], "No module named 'nowhere'"),
        (["--workloads", "poetry"], "no workload named poetry"),
        (["--questions", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--json", "/nowhere/out.json"], "there is no directory /nowhere"),
        (["--dtype", "int3", "--model", "/nowhere"], "give float32, bfloat16 or float16"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(directory, arguments, said):
    result = bench(directory, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.output
