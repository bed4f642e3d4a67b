"""Runs that are kept in a file: an interrupt loses nothing, and nothing is mixed that does not belong together."""

from __future__ import annotations

import json
import math

import pytest

from specdec.bench import run
from specdec.bench.disturbance import Disturbance, Probe, busy_seconds, calibration
from specdec.bench.measure import Run
from specdec.bench.methods import Method
from specdec.bench.run import Ask, Comparison
from specdec.bench.runfile import RunFile

ASKS = [Ask("code", [i], f"question {i}") for i in range(4)]
SAME = {"model": "tiny", "threads": 1}
NAMES = ["a", "b"]


class Interrupt(KeyboardInterrupt):
    """Somebody's Ctrl-C."""


@pytest.fixture
def order(monkeypatch):
    """What was measured, in order; all answers are alike, but for method "wrong"."""
    order = []

    def measure(method, ids, max_new_tokens):
        if max_new_tokens == 11:
            order.append((method.name, ids[0]))
        return Run([int(method.name == "wrong")] * 11, 11, 1.0, 1.0 + len(order), 10, {"steps": len(order)})

    monkeypatch.setattr(run, "prepare", lambda model, name, *rest: Method(name, None))
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "logit_margin", lambda *_: (1.0, False))
    return order


def comparison(path, identity=SAME, names=NAMES, fresh=False):
    clock = iter(range(10**6))
    quiet = Disturbance(load=lambda: 0.004, busy=lambda: (0.0, 0.0), clock=lambda: float(next(clock)))
    return Comparison(None, ASKS, names, 11, quiet, RunFile(path, identity, fresh))


def interrupted(path, after, repeats=2, **more):
    """A comparison that was stopped when so many runs had finished."""
    one, seen = comparison(path, **more), []

    def tell(repeat, ask, method, run):
        seen.append(run)
        if sum(run is not None for run in seen) == after:
            raise Interrupt

    with pytest.raises(Interrupt):
        one.run(repeats, width=-1.0, tell=tell)
    return one


@pytest.mark.parametrize("after", [1, 4, 11, 12, 13, 20])
def test_an_interrupt_loses_nothing(order, tmp_path, after):
    path = tmp_path / "runs.jsonl"
    interrupted(path, after)
    assert len(order) == after
    again = comparison(path)
    again.run(2, width=-1.0)
    assert len(order) == 2 * 4 * 3  # nothing twice, nothing left out
    assert {key: len(runs) for key, runs in again.runs.items()} == {
        (name, i): 2 for name in ("plain", "a", "b") for i in range(4)
    }
    straight = comparison(tmp_path / "other.jsonl")
    straight.run(2, width=-1.0)
    assert order[:after] == order[24 : 24 + after]
    assert {key: [r.tokens for r in runs] for key, runs in again.runs.items()} == {
        key: [r.tokens for r in runs] for key, runs in straight.runs.items()
    }
    assert [r["seconds"] for r in again.file.of("probe")] == [0.004] * ((after - 1) // 3)  # stopped before the last one


def test_the_times_that_count_are_those_of_both_halves(order, tmp_path):
    path = tmp_path / "runs.jsonl"
    first = interrupted(path, 5)
    kept = {key: [run.decode for run in runs] for key, runs in first.runs.items()}
    again = comparison(path)
    assert {key: [run.decode for run in runs] for key, runs in again.runs.items()} == kept
    assert again.spent == first.spent
    again.run(1)
    assert all(again.runs[key][0].decode == times[0] for key, times in kept.items())
    assert again.runs["plain", 0][0].counted == {"steps": 1}


def test_what_differed_before_the_interrupt_differs_after_it(order, tmp_path):
    path = tmp_path / "runs.jsonl"
    interrupted(path, 10, names=["wrong"])
    again = comparison(path, names=["wrong"])
    again.run(2, width=-1.0)
    assert [(d.method, d.prompt, d.position) for d in again.differences] == [("wrong", i, 0) for i in range(4)]
    assert len(again.runs["wrong", 0]) == 1


def test_a_line_cut_by_a_kill_is_measured_again(order, tmp_path):
    path = tmp_path / "runs.jsonl"
    interrupted(path, 7)
    path.write_text(path.read_text()[:-20])
    again = comparison(path)
    assert sum(map(len, again.runs.values())) == 6
    again.run(1)
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(record["type"] == "run" for record in whole) == 12


def test_a_rival_that_did_not_run_is_not_tried_again(order, tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    first = comparison(path)
    first._leave_out("a", "no compiler")
    again = comparison(path)
    assert again.unavailable == {"a": "no compiler"}
    again.run(1)
    assert {name for name, _ in order} == {"plain", "b"}


def test_runs_of_another_comparison_are_refused(order, tmp_path):
    path = tmp_path / "runs.jsonl"
    interrupted(path, 3)
    before = path.read_text()
    with pytest.raises(ValueError, match="threads was 1 and is now 2; --fresh begins anew"):
        comparison(path, SAME | {"threads": 2})
    with pytest.raises(ValueError, match="code was null"):
        comparison(path, SAME | {"code": "x" * 1000})
    assert path.read_text() == before
    assert comparison(path, SAME | {"threads": 2}, fresh=True).runs == {}


def test_finished_runs_are_not_gone_on_with(order, tmp_path):
    path = tmp_path / "runs.jsonl"
    one = comparison(path)
    one.run(1)
    one.file.write("done")
    assert comparison(path, SAME | {"threads": 2}).runs == {}


@pytest.mark.parametrize("text", ["hello\n", '{"type": "bench"}\n', "[]\n", '{"type": "bench", "version": 99}\n{}\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"runs\.jsonl"):
        RunFile(path, SAME)
    assert path.read_text() == text


def probes(*seconds, others=0.0, threads=2, cores=2):
    return Disturbance(threads=threads, cores=cores, probes=[Probe(each, others) for each in seconds])


def test_a_quiet_machine_is_not_disturbed():
    assert not probes(1.0, 1.05, 0.97, 1.1, 1.02).disturbed
    assert not probes().disturbed
    assert not probes(1.0).disturbed
    assert probes(1.0, 1.0, others=math.nan).taken == 0.0
    one_of_thirty = probes(*[1.0] * 29, 5.0)  # a burst that medians over prompts bear
    assert not one_of_thirty.disturbed


def test_uneven_calibrations_and_busy_cores_disturb():
    uneven = probes(*[1.0] * 8, 1.5, 1.5)
    assert (uneven.disturbed, uneven.spread) == (True, pytest.approx(0.5))
    assert "50% longer" in uneven.report()["text"]
    crowded = probes(1.0, 1.0, others=0.4)
    assert (crowded.disturbed, crowded.taken) == (True, pytest.approx(0.2))
    assert not probes(1.0, 1.0, others=0.4, cores=4).disturbed  # there is room beside two threads
    assert crowded.report()["refused"]
    assert not crowded.report(allowed=True)["refused"]


def test_others_load_is_all_but_our_own():
    clock, busy = iter([10.0, 12.0]), iter([(100.0, 40.0), (104.0, 43.0)])
    load = Disturbance(load=lambda: 0.5, busy=lambda: next(busy), clock=lambda: next(clock))
    load.begin()
    assert load.end() == Probe(0.5, 0.5)  # of 4 core-seconds in 2 seconds 3 were ours


def test_busy_seconds_are_read_from_linux(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 5000 70 6 4 40 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    everybody, ours = busy_seconds(stat)
    assert everybody == pytest.approx(200 / 100)
    assert ours > 0
    assert busy_seconds(tmp_path / "nothing") is None
    stat.write_text("cpu 1 2\n")
    assert busy_seconds(stat) is None


def test_the_fixed_load_takes_a_moment():
    assert 0 < calibration() < 1
