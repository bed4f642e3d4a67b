"""Methods of the benchmark: what their names mean, that they have plain ``generate``'s tokens, and who is caught."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from specdec import cpu
from specdec.bench import methods, report, rivals
from specdec.bench.counts import added, by_depth, conditional
from specdec.bench.measure import measure
from specdec.bench.methods import RivalError, known, prepare
from specdec.bench.parts import parts, source
from specdec.bench.quicker import Kernels
from specdec.bench.run import Ask, Comparison
from specdec.policies import FixedPolicy
from tests import tiny

IDS = [5, 6, 7, 5, 6, 7]
MINE = """
import time

import torch

from specdec.core import DraftTree
from specdec.policies import FixedPolicy
from specdec.verifiers import PathwiseVerifier


class Slow:
    name, topk, hidden = "slow", 0, False

    def draft(self, contexts, budgets):
        time.sleep(0.01)
        return [DraftTree.chain(c.tokens[-1], c.tokens[-2:-1], [0.5], "slow") if b.nodes else
                DraftTree.root(c.tokens[-1]) for c, b in zip(contexts, budgets)]


class Kept(Slow):
    resets = 0

    def reset(self):
        self.resets += 1


kept = Kept()


def small():
    return FixedPolicy(4, 4, 1)


class Wrong(PathwiseVerifier):
    "Judges as the default verifier does, but the fifth time it takes the last token for another."

    def begin(self, *rest):
        bound = PathwiseVerifier().begin(*rest)
        verify, calls = bound.verify, iter(range(1000))

        def mistaken(contexts, batch):
            if next(calls) == 4:
                batch = [DraftTree.root((tree.tokens[0] + 1) % 32) for tree in batch]
            return verify(contexts, batch)

        bound.verify = mistaken
        return bound


class Forgetful:
    "A model that drops one token in 500."

    def __init__(self, model):
        self.model, self.device, self.said = model, model.device, 0

    def generate(self, ids, **arguments):
        output = self.model.generate(ids, **arguments)
        new = output.shape[1] - ids.shape[1]
        self.said, before = self.said + new, self.said
        if before // 500 == self.said // 500:
            return output
        at = ids.shape[1] + new - 1 - self.said % 500 if self.said % 500 < new else output.shape[1] - 1
        return torch.cat([output[:, :at], output[:, at + 1:]], 1)
"""


@pytest.fixture(scope="module")
def model():
    return tiny.model(eos_token_id=None, vocab_size=32, initializer_range=0.02)  # says much twice


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of somebody's own in the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine", None)


def test_names_of_parts():
    assert parts("suffix") == ("suffix", "auto", "pathwise")
    assert parts("retrieval:some/where@auto")[0] == "retrieval:some/where"
    drafter, policy, verifier = parts("recycling@fixed:16:8:2@pathwise")
    assert (drafter, verifier) == ("recycling", "pathwise")
    assert isinstance(policy, FixedPolicy)
    assert (policy.fixed.nodes, policy.fixed.depth, policy.fixed.width) == (16, 8, 2)
    drafter, policy, _ = parts("fixed:64")
    assert (drafter, policy.fixed.nodes) == ("auto", 64)


def test_parts_of_somebodys_own(mine):
    drafter, policy, verifier = parts("mine:Slow@mine:small@specdec.verifiers:PathwiseVerifier")
    assert (drafter.name, policy.fixed.nodes, type(verifier).__name__) == ("slow", 4, "PathwiseVerifier")
    assert parts("mine:Slow").drafter is not parts("mine:Slow").drafter  # each repeat has its own
    before = sys.modules["mine"].kept.resets
    assert parts("mine:kept").drafter is parts("mine:kept").drafter
    assert sys.modules["mine"].kept.resets == before + 2


def test_unknown_methods_are_refused(mine):
    names = [
        "plain",
        "fixed:64",
        "assisted",
        "assisted:some/where",
        "compiled",
        "economize+kernels",
        "suffix@fixed:8+kernels",
    ]
    assert [known(name) for name in names] == names
    wrong = (
        "assistant", "compiled:", "fast", "fixed", "fixed:", "fixed:-1", "ngram:4", "ngram@slow", "ngram@auto@wise",
        "a@b@c@d", "ngram@fixed:1:2:3:4:5", "mine:Nobody", "nowhere:Drafter", "mine:small", "adapter:",
        "ngram@mine:Slow",
    )  # fmt: skip
    for name in wrong:
        with pytest.raises(ValueError, match=f"no method named '{name}'"):
            known(name)


def test_code_is_told_apart(mine, tmp_path):
    before = source(["mine:Slow@auto", "plain"])
    assert source(["mine:Slow@auto", "plain"]) == before != source(["plain"])
    (tmp_path / "mine.py").write_text(MINE + "\n")
    assert source(["mine:Slow@auto", "plain"]) != before


@pytest.mark.parametrize(
    "name", ["ngram", "suffix", "recycling", "auto", "fixed:16", "auto+kernels", "lookahead@fixed:8:4:2@pathwise"]
)
def test_our_methods_are_equal_and_counted(model, name):
    got = measure(prepare(model, name), IDS, 24)
    assert got.tokens == measure(prepare(model, "plain"), IDS, 24).tokens
    assert 0 < got.passes <= len(got.tokens)
    assert got.counted["tokens"] == 24
    assert "generate" not in vars(model)  # views are wrapped, never the model itself
    assert not any("forward" in vars(layer) for layer in model.modules())  # kernels are there only while it generates


def test_a_method_that_drops_one_token_in_500_is_caught(model, mine):
    asks = [Ask("letters", [5 + i, 6, 7 + i]) for i in range(9)]
    comparison = Comparison(model, asks, ["adapter:mine:Forgetful", "ngram"], 64)
    comparison.run()
    (difference,) = comparison.differences
    assert difference.method == "adapter:mine:Forgetful"
    assert difference.prompt == 7  # the 500th token is in the eighth answer of 64
    failed, fine = (next(r for r in report.results(comparison) if r["method"] == n) for n in comparison.names[1:])
    assert (failed["equal"], failed["speedup"], failed["tokens_per_second"]) == (False, None, None)
    assert fine["equal"]
    assert fine["speedup"] > 0


def test_a_wrong_verifier_is_caught(model, mine):
    comparison = Comparison(model, [Ask("letters", IDS)], ["ngram@fixed:0@mine:Wrong"], 24)
    comparison.run()
    (difference,) = comparison.differences
    assert (difference.method, difference.position) == ("ngram@fixed:0@mine:Wrong", 5)
    assert difference.margin > 0


def test_a_slow_drafter_shows_in_the_seconds_of_drafting(model, mine, monkeypatch):
    """By a clock that stands still but while it sleeps."""
    clock, slow = [0.0], parts("mine:Slow").drafter
    for module in ("specdec.statistics", "specdec.verifiers.pathwise"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    sleeping = SimpleNamespace(sleep=lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(sys.modules[type(slow).__module__], "time", sleeping)
    comparison = Comparison(model, [Ask("letters", IDS)], ["mine:Slow@mine:small", "ngram@mine:small"], 24)
    comparison.run()
    slow, quick = report.parts(comparison)[-2:]
    assert slow["method"] == "mine:Slow@mine:small"
    assert slow["seconds"]["draft"] > 0.0099 * (slow["steps"] - 1) > 0
    spent = [{part for part, seconds in each["seconds"].items() if seconds} for each in (slow, quick)]
    assert [parts - {"other"} for parts in spent] == [{"draft"}, set()]


def test_counts_of_runs_add_up():
    run = {
        "steps": 5, "tokens": 8, "drafted": 9, "accepted": 3, "seconds": {"draft": 1.0, "verify": 2.0},
        "by_drafter": {"a": {"drafted": 9, "accepted": 3}}, "depths": {"0": 1, "2": 2, "3": 1},
        "accepted_lengths": {"0": 2, "1": 1, "2": 1}, "refused": {"0": 1, "1": 1}, "sizes": {"1": 1, "4": 3},
    }  # fmt: skip
    total = added([run, run])
    assert (total["steps"], total["seconds"]["verify"], total["by_drafter"]["a"]["accepted"]) == (10, 4.0, 6)
    # Of three steps that guessed two deep, one accepted two; of two that went on after one, one accepted.
    assert by_depth(total) == by_depth(run) == [0.6667, 0.3333, 0.0]
    assert conditional(total) == conditional(run) == [0.6667, 0.5]


def test_prompt_lookup_takes_fewer_passes_than_tokens(model):
    got = measure(prepare(model, "prompt-lookup"), IDS, 24)
    assert got.tokens == measure(prepare(model, "plain"), IDS, 24).tokens
    assert got.passes < len(got.tokens)


def test_a_draft_model_of_the_targets_first_layers(model):
    cut = rivals.first_layers(model, 1)
    ids = torch.tensor([IDS])
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
    plain = measure(prepare(model, "plain"), IDS, 24)
    for _ in range(2):
        got = measure(method, IDS, 24)
        assert (got.tokens, 0 < got.decoded < 24) == (plain.tokens, True)
        assert got.passes <= 24


def test_a_compiled_model_has_a_cache_for_each_size_of_text_and_compiles_it_before_time_counts():
    class Called:
        device, calls = torch.device("cpu"), []

        def generate(self, ids, streamer=None, **arguments):
            self.calls.append((self, streamer, arguments["max_cache_len"], arguments["max_new_tokens"]))

    class Watch:
        def start(self):
            Called.calls.append("start")

    view, arguments = rivals.compiled(Called())
    watch = Watch()
    for length, most in ((9, 8), (300, 212), (300, 213), (2000, 64), (20, 9)):
        view.generate(torch.ones(1, length), watch, max_new_tokens=most, **arguments)
    own = {size: view.views[size] for size in (512, 1024, 4096)}
    assert len(set(own.values())) == 3
    assert [call if call == "start" else (call[0] is own[call[2]], *call[1:]) for call in Called.calls] == [
        *[(True, None, 512, 3), "start", (True, watch, 512, 8), (True, watch, 512, 212)],
        *[(True, None, 1024, 3), "start", (True, watch, 1024, 213)],
        *[(True, None, 4096, 3), "start", (True, watch, 4096, 64), (True, watch, 512, 9)],
    ]


def test_a_draft_model_from_a_directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    got = measure(prepare(model, known(f"assisted:{tmp_path}")), IDS, 24)
    assert got.tokens == measure(prepare(model, "plain"), IDS, 24).tokens
    assert got.passes < 24  # it guesses what the target says


def test_our_own_errors_are_not_a_rivals(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        measure(prepare(model, "auto"), IDS, -1)
    with pytest.raises(RivalError, match="max_new_tokens"):
        measure(prepare(model, "prompt-lookup"), IDS, -1)


def test_an_adapter_that_fails_is_a_rival_that_does_not_run(model, mine):
    parts("mine:Slow")
    sys.modules["mine"].broken = lambda model: 1 / 0
    with pytest.raises(RivalError, match="ZeroDivisionError"):
        prepare(model, "adapter:mine:broken")
    assert not methods.is_ours("adapter:mine:broken+kernels")
    assert methods.is_ours("mine:Slow+kernels")


def test_kernels_are_made_once_and_taken_out(model, monkeypatch):
    made, install = [], cpu.install
    monkeypatch.setattr(cpu, "install", lambda model: made.append(model) or install(model))
    kernels, other = Kernels(model), model.model.norm
    other.forward = other.forward  # somebody else's
    methods = [prepare(model, name, kernels) for name in ("plain+kernels", "ngram+kernels", "plain+kernels")]
    assert made == []
    for method in methods:
        assert len(measure(method, IDS, 4).tokens) == 4
        with kernels.inside():
            assert cpu.installed(model)
        assert [layer for layer in model.modules() if "forward" in vars(layer)] == [other]
    assert len(made) == 1
    del other.forward
