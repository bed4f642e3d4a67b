"""The scripts that measure passes and write the figures of the pages: they show what was measured, and only that."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cost
import figures
import pytest
import typer
import without_texts

from specdec.bench import report, run
from specdec.bench.measure import Run
from specdec.bench.methods import Method
from specdec.bench.run import Ask, Comparison
from specdec.tally import read_cost
from tests import tiny

ROOT = Path(__file__).parent.parent
OVERHEAD = {"drafter": "recycling", "nodes": 64, "pass_ms": 10.0, "outside_ms": 0.25, "ratio": 0.025}


@pytest.fixture(scope="module")
def model():
    return tiny.model(intermediate_size=64)


@pytest.fixture
def written(model, monkeypatch, tmp_path):
    """What a comparison of an honest method with one that lies about its third token writes."""

    def measure(method, ids, max_new_tokens):
        tokens = [1, 2, 3, 4] * 8
        tokens[2] += method.name == "liar"
        return Run(tokens, 32, 1.0, {"honest": 5.0}.get(method.name, 10.0 + ids[0]), 31, {"steps": 32})

    monkeypatch.setattr(run, "prepare", lambda model, name, *rest: Method(name, None))
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(report, "parts", lambda comparison: [])
    comparison = Comparison(model, [Ask(kind, [i + 1]) for i, kind in enumerate(("code", "code", "sql"))], [], 32)
    comparison.names = ("plain", "honest", "liar")
    comparison.run()
    comparison.unavailable["flashspec"] = "not installed"
    made = report.report(comparison, "tiny", tiny.tokenizer(), allow_disturbed=True) | {"overhead": OVERHEAD}
    made["disturbance"]["disturbed"] = False
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    return made


def test_the_readme_shows_what_was_measured(written, tmp_path):
    text = figures.speeds.figures(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| sql |"))
    assert "2.60x / 1.00" in row  # one prompt: no interval
    assert "2.30x (2.20-2.40) / 1.00" in text
    assert "tokens differ" in row
    assert "| mean of the kinds, the least | 2.45x, 2.30x | - |" in text
    assert "token 2 is 4, plain generate has 3" in text
    assert "2.5% of the pass's 10.0 ms" in text
    assert "| workload | honest |" in figures.speeds.figures(tmp_path, ["honest"])
    assert "flashspec" not in text
    assert "`flashspec` did not run: not installed." in figures.speeds.figures(tmp_path, against=True)


def test_loops_are_told(written, tmp_path):
    assert "end in a loop" not in figures.speeds.figures(tmp_path)  # without the loops nothing is left to show
    for r in written["results"]:
        r["speedup_without_loops"] = 1.25
    (tmp_path / "tiny.json").write_text(json.dumps(written))
    assert "3 of 3 answers end in a loop. Over all without them: honest 1.25x" in figures.speeds.figures(tmp_path)


def test_figures_measured_beside_other_load_are_not_shown(written, tmp_path):
    written["disturbance"] |= {"disturbed": True, "text": "somebody compiled"}
    (tmp_path / "tiny.json").write_text(json.dumps(written))
    with pytest.raises(SystemExit, match="somebody compiled"):
        figures.speeds.figures(tmp_path)


def test_speeds_over_other_baselines_are_tables_of_their_own(tmp_path):
    cell = {"workload": "sql", "equal": True, "tokens_per_step": 2.0, "speedup_low": None, "speedup_high": None}
    plain = [cell | {"method": name, "baseline": "plain", "speedup": 3.0} for name in ("plain", "plain+kernels")]
    over = [cell | {"method": name, "baseline": "plain+kernels", "speedup": 1.5} for name in ("auto", "auto+kernels")]
    machine = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
    written = {
        "machine": machine | {"torch": "1", "transformers": "2"}, "max_new_tokens": 8, "repeats": 1, "results": plain,
        "against": over, "differences": [],
        "overhead": OVERHEAD,
    }  # fmt: skip
    (tmp_path / "some.json").write_text(json.dumps(written))
    text = figures.speeds.figures(tmp_path, against=True)
    assert "| workload | plain+kernels |" in text
    assert "The same runs with `plain+kernels`" in text
    assert "| workload | auto+kernels |\n|---|---|\n| sql | 1.50x / 2.00 |" in text
    assert "1.50x" not in figures.speeds.figures(tmp_path)


@pytest.mark.slow
def test_what_a_pass_costs(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    for name, value in {"NODES": (1, 4, 8, 16), "CONTEXTS": (256, 1024), "COLD": 1 << 12}.items():
        monkeypatch.setattr(cost, name, value)
    given = ["--model", str(tmp_path / "model"), "--json", str(tmp_path / "cost.json"), "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["cost", *given])
    cost.main()
    seconds = read_cost(tmp_path / "cost.json", 16)
    written = json.loads((tmp_path / "cost.json").read_text())
    pick = {(r["context"], r["nodes"]): r for r in written["passes"]}
    assert seconds == {n: pick[1024, n]["ours"] for n in (1, 4, 8, 16)}
    embeddings = model.get_input_embeddings().weight
    assert written["weight_bytes"] == sum(p.nbytes for p in model.parameters()) - embeddings.nbytes
    assert written["limit"] == written["weight_bytes"] / written["bandwidth"] > 0
    assert written["best_bandwidth"] > written["bandwidth"]  # the best of all sums, and their median
    shapes = {(p["outputs"], p["inputs"]) for p in written["products"]}
    assert shapes == {(32, 32), (16, 32), (64, 32), (32, 64), (97, 32)}
    text = figures.costs.costs(tmp_path)
    one, four = (pick[256, n]["ours"] for n in (1, 4))
    assert f"{1e3 * four:.1f} / {written['limit'] / four:.0%} / {four / one:.2f}" in text
    assert f"{1e3 * one:.2f} | {one / written['limit']:.2f} | {four / one:.2f} |" in text
    (other,) = written["processes"]
    assert [(r["context"], r["nodes"]) for r in other["passes"]] == [(256, n) for n in (1, 4, 8, 16)]
    assert other["limit"] == written["weight_bytes"] / other["bandwidth"]
    assert "context 1024 nodes 16 plain " in capsys.readouterr().out


def test_what_processes_found_stands_beside_what_was_aimed_at():
    """The slowest reader first, and the median of all."""

    def found(read, *milliseconds):
        rows = [{"context": 256, "nodes": n, "ours": t / 1e3} for n, t in zip((1, 4, 8, 16), milliseconds, strict=True)]
        return {"bandwidth": 1e9 * read, "limit": 0.5 / read, "passes": rows}

    report = found(25, 30, 36, 39, 60) | {"processes": [found(50, 15, 15, 30, 30), found(20, 30, 33, 36, 45)]}
    lines = figures.costs.goals(report).splitlines()[-5:]
    assert lines == [
        "| goal |  |  | 1.30 | 1.10 | 1.30 | 1.70 |",
        "| process 1 | 20.00 | 30.00 | 1.20 | 1.10 | 1.20 | 1.50 |",
        "| process 2 | 50.00 | 15.00 | 1.50 | 1.00 | 2.00 | 2.00 |",
        "| the table's | 25.00 | 30.00 | 1.50 | 1.20 | 1.30 | 2.00 |",
        "| median | 25.00 | 30.00 | 1.50 | 1.10 | 1.30 | 2.00 |",
    ]


def test_others_questions_are_shown_without_their_texts(tmp_path):
    of = {"machine": {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}}
    of["machine"] |= {"torch": "1", "transformers": "2"}
    report = {"max_new_tokens": 4, "repeats": 1, "overhead": OVERHEAD, "differences": [], "results": [], **of}
    (tmp_path / "shown").mkdir()
    (tmp_path / "report.json").write_text(json.dumps(report | {"questions": ["a secret"], "outputs": ["another"]}))
    without_texts.main(tmp_path / "report.json", "a set of questions", tmp_path / "shown" / "some.json")
    written = (tmp_path / "shown" / "some.json").read_text()
    assert "secret" not in written
    assert "another" not in written
    assert json.loads(written)["source"] == "a set of questions"
    (tmp_path / "report.json").write_text(json.dumps(report | {"differences": [{"text": "they differ"}]}))
    with pytest.raises(typer.BadParameter, match="tokens differed"):
        without_texts.main(tmp_path / "report.json", "", tmp_path / "other.json")
    assert figures.speeds.figures(tmp_path / "shown") == "not measured yet"


def test_a_made_up_text_leaves_the_model_as_it_was(model):
    hold = cost.held(model, cost.attach.attach(model).form, 40)
    assert (hold.lengths, hold.cache.lengths) == ([40], [40])
    for nodes in (1, 5):
        assert cost.pass_time(hold, nodes, {model.lm_head: model.lm_head.forward}) > 0
        assert hold.cache.lengths == [40]
    assert "forward" not in vars(model.lm_head)


def test_pages_show_what_the_results_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    figures.main()
    for page in ("README.md", "docs/performance.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text().replace("x (", "y (", 1))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="its figures are not those of"):
        figures.main()
