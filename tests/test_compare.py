"""``specdec compare``: what is beyond noise is said, what is not is not, and what cannot be compared is told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from specdec import cli
from specdec.bench.changes import changes, settings

MACHINE = {"model": "demo", "cores": 2, "torch": "2.13"}


def record(method: str = "auto", workload: str = "chat", speedup: float | None = 2.0, **changed: Any) -> dict[str, Any]:
    """A bench record whose interval is 4 percent wide."""
    sides = (None, None) if speedup is None else (0.98 * speedup, 1.02 * speedup)
    return {
        "method": method, "workload": workload, "prompts": 8, "tokens": 512, "equal": True, "baseline": "plain",
        "speedup": speedup, "speedup_low": sides[0], "speedup_high": sides[1], "tokens_per_second": 20.0, **changed,
    }  # fmt: skip


def report(*records: dict[str, Any], **machine: Any) -> dict[str, Any]:
    return {"version": 2, "machine": MACHINE | machine, "max_new_tokens": 64, "results": list(records)}


def kinds(a: dict[str, Any], b: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(change.method, change.workload): change.kind for change in changes(a, b)}


@pytest.mark.parametrize(
    ("speedup", "kind"), [(2.0, "within noise"), (2.02, "within noise"), (2.4, "faster"), (1.7, "slower")]
)
def test_a_change_is_what_the_ratios_interval_says(speedup, kind):
    (change,) = changes(report(record()), report(record(speedup=speedup)))
    assert change.kind == kind
    assert change.ratio == pytest.approx(speedup / 2, abs=1e-4)
    # Both sides' logarithms deviate by log(1.02 / 0.98) / (2 * 1.96); their difference by the root of two times that.
    assert change.high / change.low == pytest.approx((1.02 / 0.98) ** math.sqrt(2), rel=1e-3)


def test_noise_of_measuring_alone_counts_where_it_is_recorded():
    a, b = record(speedup_noise=0.002), record(speedup=2.03, speedup_noise=0.002)
    assert kinds(report(a), report(b)) == {("auto", "chat"): "faster"}
    assert kinds(report(a), report(record(speedup=2.03))) == {("auto", "chat"): "within noise"}


def test_many_comparisons_widen_each_interval():
    one, many = [record(speedup=2.1)], [record(speedup=2.1), *(record(workload=f"w{n}") for n in range(99))]
    olds = [record(), *(record(workload=f"w{n}") for n in range(99))]
    assert kinds(report(record()), report(*one))["auto", "chat"] == "faster"
    assert kinds(report(*olds), report(*many))["auto", "chat"] == "within noise"


def test_two_runs_of_the_same_thing_seldom_differ_anywhere():
    """Simulated: 20 methods measured twice with the same noise, which their intervals tell rightly."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = ([record(f"m{n}", speedup=2 * math.exp(rng.normal(0, 0.0102))) for n in range(20)] for _ in range(2))
        alarms += any(change.kind != "within noise" for change in changes(report(*a), report(*b)))
    assert 0.02 < alarms / 400 <= 0.08  # 0.05 is due; were intervals not widened, it would be 0.64


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (record(), record(speedup=None, equal=False), "equality lost"),
        (record(speedup=None, equal=False), record(), "equality gained"),
        (record(), None, "only in A"),
        (None, record(), "only in B"),
        (record(), record(prompts=7), "not judged"),
        (record(), record(tokens=500), "not judged"),
        (record(), record(baseline="compiled"), "not judged"),
        (record(), record(speedup=None), "not judged"),
        (record(), record(speedup_low=2.0, speedup_high=2.0), "not judged"),
        (record(speedup=None, equal=False), record(speedup=None, equal=False), "not judged"),
    ],
)
def test_what_cannot_be_compared_is_said(old, new, kind):
    a, b = (report(*([each] if each else [])) for each in (old, new))
    (change,) = changes(a, b)
    assert change.kind == kind
    assert bool(change.why) == (kind == "not judged")
    assert change.ratio is None


def test_baselines_are_settings_not_methods():
    a, b = (report(record("plain", speedup=1.0, tokens_per_second=pace), record()) for pace in (20.0, 15.0))
    assert kinds(a, b) == {("auto", "chat"): "within noise"}
    assert settings(a, b) == {"plain tokens/s (chat)": (20.0, 15.0)}


def test_what_the_runs_differ_in_comes_first(tmp_path):
    b = report(record(speedup=1.5), cores=4, numba="0.61") | {"max_new_tokens": 32}
    result = invoke(tmp_path, report(record()), b)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1:4] == [["cores", "2", "4"], ["max_new_tokens", "64", "32"], ["numba", "None", "0.61"]]
    assert ["auto", "chat", "2.00", "1.50", "0.75", "0.73", "to", "0.77", "slower"] in lines
    assert "1 of 1 compared speeds changed beyond noise." in result.stdout


def test_it_fails_where_something_is_slower_if_asked_to(tmp_path):
    old = report(record())
    for new, code in [
        (report(record(speedup=1.5)), 1),
        (report(record(speedup=None, equal=False)), 1),
        (report(record(speedup=2.5)), 0),
        (report(record(speedup=1.99)), 0),
        (report(), 0),
    ]:
        assert invoke(tmp_path, old, new, "--fail-on-slower").exit_code == code
        assert invoke(tmp_path, old, new).exit_code == 0


def test_json_has_everything(tmp_path):
    out = tmp_path / "out.json"
    old = report(record(), record("old"))
    invoke(tmp_path, old, report(record(speedup=3.0), torch="2.14"), "--json", out)
    told = json.loads(out.read_text())
    assert told["settings"] == {"torch": ["2.13", "2.14"]}
    assert [change["kind"] for change in told["changes"]] == ["faster", "only in A"]
    assert told["changes"][0]["before"] == 2.0


@pytest.mark.parametrize("content", ["text", "[]", "{}", '{"results": [{"method": "auto"}]}'])
def test_what_is_no_report_is_told_in_a_line(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    (tmp_path / "good.json").write_text(json.dumps(report(record())))
    result = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "good.json"), str(tmp_path / "bad.json")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'bad.json'}: no report of specdec bench")


def invoke(folder: Path, a: dict[str, Any], b: dict[str, Any], *options: Any) -> Any:
    paths = [folder / "a.json", folder / "b.json"]
    for path, content in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(content))
    return CliRunner().invoke(cli.app, ["compare", *map(str, [*paths, *options])], catch_exceptions=False)
