"""The benchmark: equal tokens before speed, methods taking turns, repeats until it is sure, figures of what was run."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from specdec.bench import measure as measuring
from specdec.bench import report, rivals, run, steps
from specdec.bench.disturbance import Disturbance
from specdec.bench.measure import Run, measure
from specdec.bench.methods import Method, prepare
from specdec.bench.quicker import Kernels
from specdec.bench.run import Ask, Comparison
from tests import tiny

RESULT_KEYS = {
    "method", "workload", "prompts", "tokens", "equal", "tokens_per_step", "tokens_per_second", "baseline", "loops",
    "speedup", "speedup_low", "speedup_high", "speedup_with_prefill", "prefill_seconds", "speedup_without_loops",
}  # fmt: skip
PARTS = {"prefill", "draft", "verify", "walk", "cache", "other"}
ASKS = [Ask("code", [5, 6, 7, 5, 6, 7]), Ask("code", [9, 8, 7, 9]), Ask("sql", [3, 3, 4, 3, 3])]


@pytest.fixture(scope="module")
def model():
    return tiny.model(eos_token_id=None, vocab_size=32, initializer_range=0.02)  # says much twice


class Liar:
    """A model whose ``generate`` has the right tokens but one, at ``position``, in answers of 8."""

    def __init__(self, model, position):
        self.model, self.position, self.device, self.calls = model, position, model.device, 0

    def generate(self, ids, **arguments):
        output = self.model.generate(ids, **arguments)
        if arguments["max_new_tokens"] == 8:
            self.calls += 1
            at = ids.shape[1] + self.position
            output[0, at] = (output[0, at] + 1) % 32
        return output


@pytest.fixture
def liar(model, monkeypatch):
    """ "liar" is a method that lies about token 3 of each answer; "honest" is plain ``generate`` under another name."""
    liar = Liar(model, 3)
    made = {"liar": lambda: Method("liar", liar), "honest": lambda: Method("honest", model)}
    monkeypatch.setattr(
        run, "prepare", lambda model, name, *rest: made[name]() if name in made else prepare(model, name)
    )
    return liar


def compared(model, names, repeats=1, asks=ASKS, tokens=8, **more):
    comparison = Comparison(model, asks, names, tokens, **more)
    comparison.run(repeats)
    return comparison


class Fake:
    """Runs without a model: method -> seconds per token by (prompt, repeat); all answers are the same 11 tokens."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.order = seconds, []
        monkeypatch.setattr(run, "prepare", lambda model, name, *rest: Method(name, None))
        monkeypatch.setattr(run, "measure", self.measure)

    def measure(self, method, ids, max_new_tokens):
        if max_new_tokens != 11:  # the first run, to get warm
            return None
        prompt = ids[0]
        repeat = self.order.count((method.name, prompt))
        self.order.append((method.name, prompt))
        return Run([0] * 11, 11, 1.0, 10 * self.seconds(method.name, prompt, repeat), 10)


def faked(names, prompts, workloads=1):
    asks = [Ask(f"kind {i % workloads}", [i]) for i in range(prompts)]
    return Comparison(None, asks, names, 11)


def test_a_method_whose_tokens_differ_is_reported_and_not_run_again(model, liar):
    comparison = compared(model, ["liar", "honest"], repeats=3)
    assert liar.calls == 3  # each prompt once
    assert [(d.method, d.prompt, d.position) for d in comparison.differences] == [("liar", i, 3) for i in range(3)]
    for record in report.results(comparison):
        assert record["equal"] == (record["method"] != "liar")
        timed = {record[key] is not None for key in report.TIMED}
        assert timed == {record["method"] != "liar"}
    assert {len(comparison.runs["honest", i]) for i in range(3)} == {3}


def test_a_lie_on_one_workload_leaves_the_others_their_speed_but_not_the_whole(model, liar, monkeypatch):
    honest_on_code = lambda ids, **arguments: (  # noqa: E731
        Liar.generate(liar, ids, **arguments) if ids[0, 0] == 3 else model.generate(ids, **arguments)
    )
    monkeypatch.setattr(liar, "generate", honest_on_code)
    results = report.results(compared(model, ["liar"]))
    speed = {r["workload"]: r["speedup"] for r in results if r["method"] == "liar"}
    assert speed["code"] is not None
    assert speed["sql"] is None
    assert speed["all"] is None


def test_a_lie_told_only_in_a_later_repeat_is_found(model, liar, monkeypatch):
    honest = iter([True] * 3 + [False] * 3)
    monkeypatch.setattr(
        liar,
        "generate",
        lambda ids, **arguments: (
            model.generate(ids, **arguments)
            if arguments["max_new_tokens"] != 8 or next(honest)
            else Liar.generate(liar, ids, **arguments)
        ),
    )
    comparison = compared(model, ["liar"], repeats=2)
    assert not comparison.equal("liar", "code")
    assert all(r["speedup"] is None for r in report.results(comparison) if r["method"] == "liar")


def test_methods_take_turns_on_each_prompt(monkeypatch):
    fake = Fake(monkeypatch, lambda *_: 1.0)
    faked(["honest"], 3).run(2)
    names, prompts = zip(*fake.order, strict=True)
    assert prompts == (0, 0, 1, 1, 2, 2) * 2
    first = [names[i] for i in range(0, 12, 2)]
    assert first == ["plain", "honest", "plain", "honest", "plain", "honest"]  # the other order in the second repeat


def test_each_repeat_begins_with_empty_memories(model, monkeypatch):
    made = []
    monkeypatch.setattr(run, "prepare", lambda model, name, *rest: made.append(name) or prepare(model, name))
    compared(model, ["recycling"], repeats=3)
    # At first "recycling" is made twice: one gets warm on a text, the other has not seen it.
    assert made == ["plain", "recycling", "recycling", *["plain", "recycling"] * 2]


def test_it_repeats_until_measuring_adds_little(monkeypatch):
    rng = np.random.default_rng(0)
    steady = Fake(monkeypatch, lambda method, prompt, repeat: (1 + prompt) * rng.normal(1, 0.001))
    faked(["a"], 6, workloads=2).run(9, width=0.1)
    assert len(steady.order) == 2 * 6 * 2  # two repeats: one tells nothing of what measuring adds
    noisy = Fake(monkeypatch, lambda method, prompt, repeat: (1 + prompt) * rng.lognormal(0, 0.3))
    faked(["a"], 6, workloads=2).run(9, width=0.1)
    assert len(noisy.order) == 2 * 6 * 9
    noisy.order.clear()
    faked(["a"], 6, workloads=2).run(9, width=10.0)
    assert len(noisy.order) == 2 * 6 * 2


def test_after_the_time_cap_nothing_is_repeated(monkeypatch):
    fake = Fake(monkeypatch, lambda *_: 1.0)  # each run takes 11 seconds
    comparison = faked(["a"], 3)
    comparison.run(9, width=-1.0, seconds=6 * 11 + 1)
    assert len(fake.order) == 6 + 2
    fake.order.clear()
    faked(["a"], 3).run(9, width=-1.0, seconds=1)
    assert len(fake.order) == 6  # the first repeat is always whole
    assert report.results(comparison)[0]["tokens_per_second"] == pytest.approx(1.0)


def twins(seed, noise, spread, prompts=12, repeats=3):
    """Seconds of plain and of one method measured as two; ``spread`` tells prompts apart, ``noise`` repeats."""
    rng = np.random.default_rng(seed)
    true = rng.lognormal(0.7, spread, prompts)
    seconds = {
        (name, i): [Run([0] * 11, 11, 1.0, s, 10) for s in 10 * mean * rng.lognormal(0, noise, repeats)]
        for i in range(prompts)
        for name, mean in (("plain", 1.0), ("a", 1 / true[i]), ("b", 1 / true[i]))
    }
    comparison = faked(["a", "b"], prompts)
    comparison.runs = seconds
    return report.results(comparison)[-2:]


@pytest.mark.parametrize(("noise", "spread"), [(0.05, 0.3), (0.05, 0.0), (0.2, 0.1)])
def test_the_same_method_measured_twice_differs_by_less_than_its_interval(noise, spread):
    measured = [twins(seed, noise, spread) for seed in range(40)]
    apart = [abs(a["speedup"] - b["speedup"]) >= a["speedup_high"] - a["speedup_low"] for a, b in measured]
    outside = [not a["speedup_low"] <= b["speedup"] <= a["speedup_high"] for a, b in measured]
    assert sum(apart) <= 2  # of 40
    # Where prompts are alike the interval is one measurement's error, and the other one errs too.
    assert sum(outside) <= (2 if spread == 0.3 else 10)


def test_results_have_the_promised_keys_and_are_json(model, liar):
    comparison = compared(model, ["honest"], repeats=2)
    records = json.loads(json.dumps(report.results(comparison), allow_nan=False))
    assert all(set(record) == RESULT_KEYS for record in records)
    assert [(r["workload"], r["method"]) for r in records] == [
        (workload, method) for workload in ("code", "sql", "all") for method in ("plain", "honest")
    ]
    whole = records[-2]
    assert (whole["prompts"], whole["tokens"], whole["baseline"]) == (3, 24, "plain")
    assert (whole["speedup"], whole["tokens_per_step"], whole["equal"]) == (1.0, 1.0, True)


def test_figures_are_those_of_the_runs():
    runs = {("plain", i): [Run([0] * 11, 11, 1.0, 10.0, 10), Run([0] * 11, 11, 1.0, 30.0, 10)] for i in range(3)}
    runs |= {("twice", i): [Run([0] * 11, 5, 2.0, seconds, 10)] * 2 for i, seconds in enumerate((10.0, 5.0, 4.0))}
    comparison = faked(["twice"], 3)
    comparison.runs = runs
    plain, twice = report.results(comparison)[:2]
    assert plain["tokens_per_second"] == pytest.approx(3 * 10 / (3 * 20))  # the median run takes 20 s
    assert twice["speedup"] == pytest.approx(20 / 5)  # the median prompt, not the ratio of the sums
    assert twice["tokens_per_second"] == pytest.approx(30 / 19, abs=1e-4)
    assert twice["tokens_per_step"] == pytest.approx(11 / 5)
    assert twice["speedup_with_prefill"] == pytest.approx(21 / 7)
    assert twice["speedup_low"] < 4 < twice["speedup_high"]
    over, itself = report.results(comparison, "twice")[:2]
    assert (over["baseline"], over["speedup"], over["tokens_per_second"]) == (
        "twice",
        0.3333,
        plain["tokens_per_second"],
    )
    assert itself["speedup"] == 1.0


def test_answers_that_loop_are_counted_and_left_out_of_a_figure_of_their_own():
    straight, loop = list(range(64)), [1, 2, 3, 4] * 16
    comparison = faked(["twice"], 3)
    for i, (tokens, seconds) in enumerate(((straight, 40.0), (straight, 25.0), (loop, 5.0))):
        comparison.runs["plain", i] = [Run(tokens, 64, 1.0, 50.0, 63)]
        comparison.runs["twice", i] = [Run(tokens, 64, 1.0, seconds, 63)]
    twice = report.results(comparison)[1]
    assert (twice["loops"], twice["speedup"], twice["speedup_without_loops"]) == (1, 2.0, 1.625)
    comparison.asks, comparison.runs = comparison.asks[:1], {key: comparison.runs[key[0], 2] for key in comparison.runs}
    assert report.results(comparison)[1]["speedup_without_loops"] is None


def test_no_speed_over_a_baseline_whose_tokens_differ(model, liar):
    comparison = compared(model, ["liar", "honest"])
    assert all(r["speedup"] is None for r in report.results(comparison, "liar"))
    assert any(r["speedup"] for r in report.results(comparison, "honest"))


def test_answers_of_one_token_have_no_decoding_speed(model):
    results = report.results(compared(model, ["plain"], tokens=1))
    assert all(r["speedup"] is None and r["tokens_per_second"] is None for r in results)
    assert all(r["prefill_seconds"] > 0 for r in results)


def test_where_the_time_went_and_what_became_of_guesses(model):
    comparison = compared(model, ["recycling@fixed:8:4:2", "plain+kernels"], repeats=2, tokens=24)
    assert comparison.equal("recycling@fixed:8:4:2", "all")
    records = report.parts(comparison)
    assert [(r["method"], r["workload"]) for r in records] == [
        ("recycling@fixed:8:4:2", workload) for workload in ("code", "sql", "all")
    ]
    whole = records[-1]
    assert (whole["tokens"], whole["steps"] - 6) == (2 * 3 * 24, sum(whole["accepted_lengths"].values()))
    assert sum(int(n) * steps for n, steps in whole["accepted_lengths"].items()) == whole["accepted"] > 0
    assert sum((int(n) - 1) * steps for n, steps in whole["sizes"].items()) == whole["drafted"]
    assert max(map(int, whole["sizes"])) == 9
    assert whole["by_drafter"] == {"recycling": {"drafted": whole["drafted"], "accepted": whole["accepted"]}}
    assert whole["tokens"] == sum(r["tokens"] for r in records[:-1])
    assert set(whole["seconds"]) == PARTS
    total = sum(r.total for i in range(3) for r in comparison.runs["recycling@fixed:8:4:2", i])
    assert sum(whole["seconds"].values()) == pytest.approx(total, rel=1e-3)
    shares = [whole["acceptance_by_depth"], whole["conditional_acceptance"]]
    assert all(0 <= share <= 1 for each in shares for share in each)
    assert len(shares[0]) == 4


def test_the_whole_report(model):
    comparison = compared(model, ["ngram", "economize"], asks=[Ask("code", [5, 6, 5, 6], "x" * 400)], tokens=8)
    made = report.report(comparison, "tiny", tiny.tokenizer(), allow_disturbed=True)
    assert (made["version"], made["repeats"], made["max_new_tokens"]) == (2, 1, 8)
    assert made["questions"] == [{"workload": "code", "prompt": "x" * 300}]
    assert made["outputs"] == [tiny.tokenizer().decode(comparison.reference(0))]
    assert {r["workload"] for r in made["results"]} == {"code", "all"}
    json.dumps(made, allow_nan=False)


def test_a_disturbed_run_tells_no_speed(model, liar):
    ticks = iter(range(10**6))
    loads = iter([0.004, 0.004, 0.009])
    load = Disturbance(load=lambda: next(loads), busy=lambda: None, clock=lambda: float(next(ticks)))
    comparison = compared(model, ["recycling@fixed:4"], disturbance=load)
    assert len(load.probes) == 3
    made = report.report(comparison, "tiny", tiny.tokenizer())
    assert made["disturbance"]["refused"]
    assert "calibrations took" in made["disturbance"]["text"]
    assert not any(r[key] for r in made["results"] for key in report.TIMED)
    assert all(r["equal"] and r["tokens_per_step"] for r in made["results"])
    assert all(seconds is None for r in made["parts"] for seconds in r["seconds"].values())
    assert made["parts"][0]["accepted_lengths"]
    allowed = report.report(comparison, "tiny", tiny.tokenizer(), allow_disturbed=True)
    assert (allowed["disturbance"]["disturbed"], allowed["disturbance"]["refused"]) == (True, False)
    assert all(r["speedup"] for r in allowed["results"])


def test_a_rival_that_is_not_installed_is_told_and_left_out(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "economize", None)
    comparison = compared(model, ["economize", "prompt-lookup"])
    assert list(comparison.unavailable) == ["economize"]
    assert "not installed" in comparison.unavailable["economize"]
    assert {r["method"] for r in report.results(comparison)} == {"plain", "prompt-lookup"}


def test_a_rival_that_fails_on_some_prompt_is_left_out(model, monkeypatch):
    class Fails:
        device = model.device

        def generate(self, ids, **arguments):
            if ids[0].tolist() == ASKS[2].ids:
                raise RuntimeError("no compiler\nand more")
            return model.generate(ids, **arguments)

    monkeypatch.setattr(rivals, "compiled", lambda view: (Fails(), {}))
    comparison = compared(model, ["compiled"], repeats=2)
    assert comparison.unavailable == {"compiled": "on sql (prompt 2): RuntimeError: no compiler"}
    assert {r["method"] for r in report.results(comparison)} == {"plain"}
    assert [r["speedup"] for r in report.results(comparison, "compiled")] == [None] * 3


def test_time_counts_from_the_call_of_generate(model, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    class Slow:
        device = model.device

        def generate(self, ids, streamer, **arguments):
            now[0] += 5.0  # the prompt's pass, of which a streamer of ours hears only afterwards
            streamer.put(ids)
            for seconds, count in ((0.0, 1), (1.0, 3), (2.0, 2)):
                now[0] += seconds
                streamer.put(torch.zeros(count))
            return torch.zeros(1, ids.shape[1] + 6, dtype=torch.int64)

    got = measure(Method("slow", Slow()), [1, 2], 6)
    assert (got.prefill, got.decode, got.decoded, got.passes) == (5.0, 3.0, 5, 3)
    assert got.total == 8.0


def test_measure_counts_tokens_from_ids(model):
    got = measure(Method("plain", model), ASKS[0].ids, 8)
    assert (len(got.tokens), got.passes, got.decoded) == (8, 8, 7)
    assert got.prefill > 0 < got.decode


def test_ours_has_as_long_a_prefill_as_plain(model):
    got = measure(prepare(model, "ngram"), ASKS[0].ids, 8)
    assert got.prefill >= got.counted["seconds"]["prefill"] > 0


def test_overhead_is_of_the_same_passes(model):
    cost = steps.overhead(model, ASKS[:2], 8)
    assert cost["steps"] > 0
    assert cost["pass_ms"] > 0 < cost["outside_ms"]
    assert cost["ratio"] == pytest.approx(cost["outside_ms"] / cost["pass_ms"], rel=0.05)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_what_passes_cost_with_and_without_kernels(model):
    plain, ours = steps.pass_cost(model, Kernels(model), 64)
    assert (plain["kernels"], ours["kernels"], plain["context"]) == (False, True, 64)
    assert list(plain["seconds"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert all(seconds > 0 for cost in (plain, ours) for seconds in cost["seconds"].values())
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_machine_names_what_the_figures_hold_for(model):
    found = report.machine(model, "tiny")
    assert found["model"] == "tiny"
    assert found["dtype"] == "float32"
    assert found["torch"] == torch.__version__
    assert all(found.values())
    assert not math.isnan(found["threads"])
