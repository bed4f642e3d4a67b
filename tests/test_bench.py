"""The benchmark: equality before speed, methods taking turns, intervals that cover, figures of what was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.bench import methods, report, rivals, run, workloads
from specdec.bench.measure import Run, Stopwatch, bootstrap, first_difference, logit_margin, measure
from specdec.bench.methods import Method, RivalError, prepare
from specdec.bench.run import Ask, Comparison
from specdec.tally import read_cost

ROOT = Path(__file__).parent.parent
RESULT_KEYS = {
    "method", "workload", "prompts", "tokens", "equal", "tokens_per_step", "tokens_per_second",
    "speedup", "speedup_low", "speedup_high", "speedup_with_prefill", "prefill_seconds", "baseline",
}  # fmt: skip
ASKS = [Ask("code", [5, 6, 7, 5, 6, 7]), Ask("code", [9, 8, 7, 9]), Ask("sql", [3, 3, 4, 3, 3])]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Liar:
    """A model whose ``generate`` has the right tokens but one."""

    def __init__(self, model, position):
        self.model, self.position, self.device, self.calls = model, position, model.device, 0

    def generate(self, ids, **arguments):
        self.calls += 1
        output = self.model.generate(ids, **arguments)
        at = ids.shape[1] + self.position
        if at < output.shape[1]:
            output[0, at] = (output[0, at] + 1) % 32
        return output


@pytest.fixture
def liar(model, monkeypatch):
    """ "liar" is a method that lies about token 3 of each answer; "honest" is plain ``generate`` under another name."""
    liar = Liar(model, 3)
    made = {"liar": lambda: Method("liar", liar), "honest": lambda: Method("honest", model)}
    monkeypatch.setattr(run, "prepare", lambda model, name: made[name]() if name in made else prepare(model, name))
    return liar


def test_a_method_whose_tokens_differ_is_reported_and_never_timed(model, liar):
    comparison = Comparison(model, ASKS, ["liar", "honest"], 8)
    comparison.check()
    calls = liar.calls
    comparison.time(2)
    assert liar.calls == calls + 2  # the short first run of each repeat, no timed one
    assert [(d.method, d.prompt, d.position) for d in comparison.differences] == [("liar", i, 3) for i in range(3)]
    for record in report.results(comparison):
        assert record["equal"] == (record["method"] != "liar")
        assert (record["speedup"] is None) == (record["method"] == "liar")
        assert (record["tokens_per_second"] is None) == (record["method"] == "liar")


def test_a_lie_on_one_workload_leaves_the_others_their_speed_but_not_the_whole(model, liar, monkeypatch):
    monkeypatch.setattr(liar, "position", 3)
    honest_on_code = lambda ids, **arguments: (  # noqa: E731
        Liar.generate(liar, ids, **arguments) if ids[0, 0] == 3 else model.generate(ids, **arguments)
    )
    monkeypatch.setattr(liar, "generate", honest_on_code)
    comparison = Comparison(model, ASKS, ["liar"], 8)
    comparison.check()
    comparison.time(1)
    speed = {r["workload"]: r["speedup"] for r in report.results(comparison) if r["method"] == "liar"}
    assert speed["code"] is not None
    assert speed["sql"] is None
    assert speed["all"] is None


def test_a_lie_told_only_when_timed_is_found(model, liar, monkeypatch):
    monkeypatch.setattr(liar, "position", 10**6)
    comparison = Comparison(model, ASKS, ["liar"], 8)
    comparison.check()
    assert comparison.equal("liar", "code")
    monkeypatch.setattr(liar, "position", 3)
    comparison.time(1)
    assert not comparison.equal("liar", "code")
    assert all(r["speedup"] is None for r in report.results(comparison) if r["method"] == "liar")


def test_the_margin_is_the_targets(model, liar):
    comparison = Comparison(model, ASKS[:1], ["liar"], 8)
    comparison.check()
    (difference,) = comparison.differences
    with torch.no_grad():
        logits = model(torch.tensor([ASKS[0].ids + comparison.references[0][:3]])).logits[0, -1]
    assert difference.expected == int(logits.argmax())
    assert difference.got == (difference.expected + 1) % 32
    assert difference.margin == pytest.approx(float(logits.max() - logits[difference.got]), rel=1e-4)
    assert "token 3 is" in str(difference)
    assert logit_margin(model, [1], None, 2) is None


def test_methods_take_turns_on_each_prompt(model, liar, monkeypatch):
    order = []
    monkeypatch.setattr(
        run, "measure", lambda method, ids, n: order.append((method.name, tuple(ids))) or Run([], 1, 1.0, 1.0, 1)
    )
    Comparison(model, ASKS, ["honest"], 8, references=[[], [], []]).time(1)
    timed = [pair for pair in order if len(pair[1]) != 8][2:]  # without the short first runs
    assert [name for name, _ in timed] == ["plain", "honest", "honest", "plain", "plain", "honest"]
    assert [ids for _, ids in timed] == [tuple(ask.ids) for ask in ASKS for _ in range(2)]


def test_each_repeat_begins_with_empty_memories(model, monkeypatch):
    made = []
    monkeypatch.setattr(run, "prepare", lambda model, name: made.append(name) or prepare(model, "plain"))
    comparison = Comparison(model, ASKS, ["auto"], 4)
    comparison.check()
    comparison.time(2)
    assert made == ["plain", "auto"] * 3


def test_results_have_the_promised_keys_and_are_json(model, liar):
    comparison = Comparison(model, ASKS, ["honest"], 8)
    comparison.check()
    comparison.time(2)
    records = json.loads(json.dumps(report.results(comparison), allow_nan=False))
    assert all(set(record) == RESULT_KEYS for record in records)
    assert [(r["workload"], r["method"]) for r in records] == [
        (workload, method) for workload in ("code", "sql", "all") for method in ("plain", "honest")
    ]
    whole = records[-2]
    assert (whole["prompts"], whole["tokens"], whole["baseline"]) == (3, 24, "plain")
    assert (whole["speedup"], whole["tokens_per_step"], whole["equal"]) == (1.0, 1.0, True)


def test_figures_are_those_of_the_runs():
    asks = [Ask("code", [1]), Ask("code", [2]), Ask("code", [3])]
    runs = {("plain", i): [Run([0] * 11, 11, 1.0, 10.0, 10), Run([0] * 11, 11, 1.0, 30.0, 10)] for i in range(3)}
    runs |= {("twice", i): [Run([0] * 11, 5, 2.0, seconds, 10)] * 2 for i, seconds in enumerate((10.0, 5.0, 4.0))}
    comparison = Comparison(None, asks, ["twice"], 11, references=[[0] * 11] * 3, runs=runs)
    plain, twice = report.results(comparison)
    assert plain["tokens_per_second"] == pytest.approx(3 * 10 / (3 * 20))  # the median run takes 20 s
    assert twice["speedup"] == pytest.approx(20 / 5)  # the median prompt, not the ratio of the sums
    assert twice["tokens_per_second"] == pytest.approx(30 / 19, abs=1e-4)
    assert twice["tokens_per_step"] == pytest.approx(11 / 5)
    assert twice["speedup_with_prefill"] == pytest.approx(21 / 7)
    assert (twice["speedup_low"], twice["speedup_high"]) == (2.0, 5.0)
    over, itself = report.results(comparison, "twice")
    assert (over["baseline"], over["speedup"], over["tokens_per_second"]) == ("twice", 0.25, plain["tokens_per_second"])
    assert itself["speedup"] == 1.0


def test_no_speed_over_a_baseline_whose_tokens_differ(model, liar):
    comparison = Comparison(model, ASKS, ["liar", "honest"], 8)
    comparison.check()
    comparison.time(1)
    assert all(r["speedup"] is None for r in report.results(comparison, "liar"))
    assert any(r["speedup"] for r in report.results(comparison, "honest"))


def test_answers_of_one_token_have_no_decoding_speed(model):
    comparison = Comparison(model, ASKS, ["plain"], 1)
    comparison.check()
    comparison.time(1)
    assert all(r["speedup"] is None and r["tokens_per_second"] is None for r in report.results(comparison))


def test_stopwatch_passes_over_the_prompt():
    watch = Stopwatch()
    for count in (5, 1, 3):
        watch.put(torch.zeros(count))
    watch.end()
    assert watch.counts == [1, 3]
    assert len(watch.times) == 3
    assert watch.times == sorted(watch.times)


def test_measure_counts_tokens_from_ids(model):
    got = measure(Method("plain", model), ASKS[0].ids, 8)
    assert (len(got.tokens), got.passes, got.decoded) == (8, 8, 7)
    assert got.prefill > 0 < got.decode
    assert got.total == got.prefill + got.decode


def test_prompt_lookup_takes_fewer_passes_than_tokens(model):
    got = measure(prepare(model, "prompt-lookup"), ASKS[0].ids, 24)
    assert got.tokens == measure(prepare(model, "plain"), ASKS[0].ids, 24).tokens
    assert got.passes < len(got.tokens)


@pytest.mark.parametrize("name", ["ngram", "recycling", "auto", "fixed:16", "auto+kernels"])
def test_our_methods_are_equal_and_counted(model, name):
    method = prepare(model, name)
    got = measure(method, ASKS[0].ids, 24)
    assert got.tokens == measure(prepare(model, "plain"), ASKS[0].ids, 24).tokens
    assert 0 < got.passes <= len(got.tokens)
    assert "generate" not in vars(model)  # views are wrapped, never the model itself
    assert not any("forward" in vars(layer) for layer in model.modules())  # kernels are there only while it generates


def test_a_draft_model_of_the_targets_first_layers(model):
    cut = rivals.first_layers(model, 1)
    ids = torch.tensor([ASKS[0].ids])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[1]
        expected = model.lm_head(model.model.norm(states))
        torch.testing.assert_close(cut(ids).logits, expected)
    assert cut.lm_head is model.lm_head
    assert (len(model.model.layers), model.config.num_hidden_layers) == (2, 2)


@pytest.mark.parametrize(
    "name", ["assisted", "economize", "flashspec", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_rivals_have_plain_generates_tokens(model, name):
    if name in ("economize", "flashspec"):
        pytest.importorskip(name)
    method = prepare(model, name)
    plain = measure(prepare(model, "plain"), ASKS[0].ids, 24)
    for _ in range(2):
        got = measure(method, ASKS[0].ids, 24)
        assert (got.tokens, 0 < got.decoded < 24) == (plain.tokens, True)
        assert got.passes <= 24


def test_a_draft_model_from_a_directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    got = measure(prepare(model, methods.known(f"assisted:{tmp_path}")), ASKS[0].ids, 24)
    assert got.tokens == measure(prepare(model, "plain"), ASKS[0].ids, 24).tokens
    assert got.passes < 24  # it guesses what the target says


def test_a_rival_that_is_not_installed_is_told_and_left_out(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "economize", None)
    comparison = Comparison(model, ASKS, ["economize", "prompt-lookup"], 8)
    comparison.check()
    comparison.time(1)
    assert list(comparison.unavailable) == ["economize"]
    assert "not installed" in comparison.unavailable["economize"]
    assert {r["method"] for r in report.results(comparison)} == {"plain", "prompt-lookup"}


def test_a_rival_that_fails_on_some_prompt_is_left_out(model, monkeypatch):
    class Fails:
        device = model.device

        def generate(self, ids, **arguments):
            if ids.shape[1] == len(ASKS[2].ids):
                raise RuntimeError("no compiler\nand more")
            return model.generate(ids, **arguments)

    monkeypatch.setattr(rivals, "compiled", lambda view: (Fails(), {}))
    comparison = Comparison(model, ASKS, ["compiled"], 8)
    comparison.check()
    comparison.time(1)
    assert comparison.unavailable == {"compiled": "on sql (prompt 2): RuntimeError: no compiler"}
    assert {r["method"] for r in report.results(comparison)} == {"plain"}
    assert [r["speedup"] for r in report.results(comparison, "compiled")] == [None] * 3


def test_our_own_errors_are_not_a_rivals(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        measure(prepare(model, "auto"), ASKS[0].ids, -1)
    with pytest.raises(RivalError, match="max_new_tokens"):
        measure(prepare(model, "prompt-lookup"), ASKS[0].ids, -1)


def test_unknown_methods_are_refused():
    names = ["plain", "fixed:64", "assisted", "assisted:some/where", "compiled", "economize+kernels"]
    assert [methods.known(name) for name in names] == names
    for name in ("assistant", "compiled:", "fast", "fixed", "fixed:", "fixed:-1", "ngram:4"):
        with pytest.raises(ValueError, match="no method named"):
            methods.known(name)


def test_overhead_is_of_the_same_passes(model):
    cost = report.overhead(model, ASKS[:2], 8)
    assert cost["steps"] > 0
    assert cost["pass_ms"] > 0 < cost["outside_ms"]
    assert cost["ratio"] == pytest.approx(cost["outside_ms"] / cost["pass_ms"], rel=0.05)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_machine_names_what_the_figures_hold_for(model):
    found = report.machine(model, "tiny")
    assert found["model"] == "tiny"
    assert found["dtype"] == "float32"
    assert found["torch"] == torch.__version__
    assert all(found.values())


@pytest.mark.parametrize(
    ("a", "b", "at"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([], [], None)]
)
def test_first_difference(a, b, at):
    assert first_difference(a, b) == at


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(1)
    assert bootstrap([2.0, 2.0]) == (2.0, 2.0)
    values = rng.normal(size=30)
    few = [bootstrap(values, seed=seed, resamples=50) for seed in (3, 3, 4)]
    assert few[0] == few[1] != few[2]
    assert all(map(math.isnan, bootstrap([]) + bootstrap([2.0])))
    intervals = [bootstrap(rng.normal(1.5, 0.3, 40), resamples=400) for _ in range(200)]
    covered = np.mean([low <= 1.5 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99
    assert np.mean([high - low for low, high in intervals]) < 0.35


def test_our_workloads():
    prompts = workloads.own()
    kinds = [prompt.workload for prompt in prompts]
    assert len(set(kinds)) >= 7
    assert all(kinds.count(kind) >= 3 for kind in kinds)
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == len(prompts)
    assert {prompt.workload for prompt in workloads.own(["sql", "chat"])} == {"sql", "chat"}
    with pytest.raises(ValueError, match=r"no workload named poetry; there are chat"):
        workloads.own(["poetry"])


def test_questions_in_three_forms(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        '{"turns": ["one", "two"], "workload": "talk"}\n\n'
        '{"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]}\n'
        '{"prompt": "go on"}\n'
    )
    first, second, third = workloads.read(path)
    assert (first.workload, first.messages, first.turns) == ("talk", ({"role": "user", "content": "one"},), ("two",))
    assert (second.workload, second.messages[0]["role"], second.messages[1]["content"]) == ("asked", "system", "hi")
    assert third.messages == ({"role": "user", "content": "go on"},)


@pytest.mark.parametrize("line", ["{", '"text"', "[]", '{"question": "?"}', '{"messages": [{"role": "user"}]}'])
def test_a_line_that_asks_nothing_is_named(tmp_path, line):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object with turns, messages or prompt"):
        workloads.read(path)


def test_later_turns_follow_the_models_own_answers():
    prompt = workloads.Prompt("talk", ({"role": "user", "content": "one"},), ("two", "three"))
    flat = workloads.unroll([prompt], lambda prompt: f"answer {len(prompt.messages)}")
    assert [len(each.messages) for each in flat] == [1, 3, 5]
    assert [message["content"] for message in flat[2].messages] == ["one", "answer 1", "two", "answer 3", "three"]
    assert not any(each.turns for each in flat)


def test_first_of_each_keeps_the_order():
    assert workloads.first_of_each(ASKS, 1) == [ASKS[0], ASKS[2]]
    assert workloads.first_of_each(ASKS, 2) == ASKS


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures():
    return script("figures")


def test_the_readme_shows_what_was_measured(model, liar, figures, tmp_path):
    comparison = Comparison(model, ASKS, ["honest", "liar"], 8)
    comparison.check()
    comparison.time(1)
    written = {
        "machine": report.machine(model, "tiny"), "max_new_tokens": 8, "repeats": 1,
        "results": report.results(comparison), "unavailable": {"flashspec": "not installed"},
        "differences": [str(d) for d in comparison.differences],
        "overhead": {"drafter": "recycling", "nodes": 64, "pass_ms": 10.0, "outside_ms": 0.25, "ratio": 0.025},
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(written))
    text = figures.figures(tmp_path)
    honest = next(r for r in written["results"] if r["method"] == "honest" and r["workload"] == "sql")
    row = next(line for line in text.splitlines() if line.startswith("| sql |"))
    assert f"{honest['speedup']:.2f}x / 1.00" in row  # one prompt: no interval
    assert re.search(r"\d\.\d\dx \(\d\.\d\d-\d\.\d\d\) / 1.00", text)
    assert "tokens differ" in row
    assert "token 3 is" in text
    assert "2.5% of the pass's 10.0 ms" in text
    assert "| workload | honest |" in figures.figures(tmp_path, ["honest"])
    assert "flashspec" not in text
    assert "`flashspec` did not run: not installed." in figures.figures(tmp_path, against=True)


def test_speeds_over_other_baselines_are_tables_of_their_own(figures, tmp_path):
    cell = {"workload": "sql", "equal": True, "tokens_per_step": 2.0, "speedup_low": None, "speedup_high": None}
    plain = [cell | {"method": name, "baseline": "plain", "speedup": 3.0} for name in ("plain", "plain+kernels")]
    over = [cell | {"method": name, "baseline": "plain+kernels", "speedup": 1.5} for name in ("auto", "auto+kernels")]
    machine = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
    written = {
        "machine": machine | {"torch": "1", "transformers": "2"}, "max_new_tokens": 8, "repeats": 1, "results": plain,
        "against": over, "differences": [],
        "overhead": {"drafter": "recycling", "nodes": 64, "pass_ms": 10.0, "outside_ms": 0.25, "ratio": 0.025},
    }  # fmt: skip
    (tmp_path / "some.json").write_text(json.dumps(written))
    text = figures.figures(tmp_path, against=True)
    assert "| workload | plain+kernels |" in text
    assert "The same runs with `plain+kernels`" in text
    assert "| workload | auto+kernels |\n|---|---|\n| sql | 1.50x / 2.00 |" in text
    assert "1.50x" not in figures.figures(tmp_path)


@pytest.mark.slow
def test_what_a_pass_costs(model, figures, tmp_path, monkeypatch, capsys):
    cost = script("cost")
    model.save_pretrained(tmp_path / "model")
    for name, value in {"NODES": (1, 4, 8, 16), "CONTEXTS": (256, 1024), "READ": 1 << 20, "COLD": 1 << 12}.items():
        monkeypatch.setattr(cost, name, value)
    monkeypatch.setattr(
        sys, "argv", ["cost", "--model", str(tmp_path / "model"), "--json", str(tmp_path / "cost.json")]
    )
    cost.main()
    seconds = read_cost(tmp_path / "cost.json", 16)
    written = json.loads((tmp_path / "cost.json").read_text())
    pick = {(r["context"], r["nodes"]): r for r in written["passes"]}
    assert seconds == {n: pick[1024, n]["ours"] for n in (1, 4, 8, 16)}
    embeddings = model.get_input_embeddings().weight
    assert written["weight_bytes"] == sum(p.nbytes for p in model.parameters()) - embeddings.nbytes
    assert written["limit"] == written["weight_bytes"] / written["bandwidth"] > 0
    assert {(p["outputs"], p["inputs"]) for p in written["products"]} == {(32, 32), (16, 32), (64, 32), (32, 64)}
    text = figures.costs(tmp_path)
    one, four = (pick[256, n]["ours"] for n in (1, 4))
    assert f"{1e3 * four:.1f} / {written['limit'] / four:.0%} / {four / one:.2f}" in text
    assert f"| ours | {one / written['limit']:.2f} | {four / one:.2f} |" in text
    assert "context 1024 nodes 16 plain " in capsys.readouterr().out


def test_a_made_up_text_leaves_the_model_as_it_was(model):
    cost = script("cost")
    hold = cost.held(model, cost.attach.attach(model).form, 40)
    assert (hold.lengths, hold.cache.lengths) == ([40], [40])
    for nodes in (1, 5):
        assert cost.pass_time(hold, nodes, {model.lm_head: model.lm_head.forward}) > 0
        assert hold.cache.lengths == [40]
    assert "forward" not in vars(model.lm_head)
