"""Replay: drafters meet recorded answers as they would meet a model that gives them, and the figures are right."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specdec
from specdec import cli
from specdec.core import Budget, Context, DraftTree, Verifier
from specdec.drafters import MergedDrafter, NgramDrafter, RecyclingDrafter
from specdec.policies import FixedPolicy
from specdec.replay import replay
from specdec.tally import Tally, read_cost, result
from specdec.traces import Response
from specdec.verifiers.recorded import RecordedVerifier

BUDGET = Budget(nodes=6, depth=4, width=3)


def response(tokens, prompt=(1, 2), session="s", namespace=""):
    return Response(session, np.array(prompt), np.array(tokens), namespace, f"line of {session}")


class Drafter:
    """Guesses what ``guess`` says: chains of tokens to be joined into a tree."""

    name, topk, hidden = "guesser", 0, False

    def __init__(self, guess):
        self.guess = guess

    def draft(self, contexts, budgets):
        return [self.tree(*each) for each in zip(contexts, budgets, strict=True)]

    def tree(self, context, budget):
        if not budget.nodes:
            return DraftTree.root(int(context.tokens[-1]))
        tokens, parents, known = [int(context.tokens[-1])], [-1], {(): 0}
        for chain in self.guess(context):
            for depth in range(len(chain)):
                path = tuple(chain[: depth + 1])
                if path not in known:
                    parents.append(known[path[:-1]])
                    known[path] = len(tokens)
                    tokens.append(path[-1])
        ones = np.ones(len(tokens), np.float32)
        return DraftTree(np.array(tokens), np.array(parents), ones, (self.name,) * len(tokens))


def total(responses, drafter, budget=BUDGET):
    return result("", replay(responses, drafter, budget))


@pytest.mark.parametrize(("length", "depth"), [(1, 4), (2, 4), (16, 4), (17, 4), (50, 1)])
def test_a_prophet_needs_the_fewest_steps(length, depth):
    answer = list(range(100, 100 + length))
    prophet = Drafter(lambda context: [answer[len(context.tokens) - 2 :][:depth]])
    told = total([response(answer)], prophet)
    assert (told["tokens"], told["steps"]) == (length, 1 + math.ceil((length - 1) / (depth + 1)))
    # A step's last token is the target's own, whether it was guessed or not.
    assert told["accepted"] == length - told["steps"]
    assert told["tokens_per_step"] == round(length / told["steps"], 4)


def test_guesses_past_the_end_change_nothing():
    past = Drafter(lambda context: [[7, 7, 7, 7]])
    told = total([response([7, 7, 7])], past)
    assert (told["tokens"], told["steps"], told["drafted"], told["accepted"]) == (3, 2, 4, 1)


def test_a_silent_drafter_has_a_token_a_step():
    told = total([response([5, 6, 7])], Drafter(lambda context: []))
    assert (told["steps"], told["drafted"], told["tokens_per_step"]) == (3, 0, 1.0)


def walked(answer, guess):
    """The counts of a replay, by the plainest walk there is."""
    steps, drafted, accepted, at = 1, 0, 0, 1
    while at < len(answer):
        paths = {tuple(chain[:n]) for chain in guess(at) for n in range(1, len(chain) + 1)}
        right = 0
        while right < len(answer) - at - 1 and tuple(answer[at : at + right + 1]) in paths:
            right += 1
        steps, drafted, accepted, at = steps + 1, drafted + len(paths), accepted + right, at + right + 1
    return steps, drafted, accepted


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_are_walked_as_a_set_of_paths(seed):
    answer = np.random.default_rng(seed).integers(0, 2, 60).tolist()

    def guess(at):
        return np.random.default_rng([seed, at]).integers(0, 2, (3, 4)).tolist()

    told = total([response(answer)], Drafter(lambda context: guess(len(context.tokens) - 2)), Budget(12, 4, 3))
    assert (told["steps"], told["drafted"], told["accepted"]) == walked(answer, guess)
    assert told["accepted"] > 0


def test_it_counts_what_decoding_the_same_answer_counts():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[3, 4, 5, 3, 4]])
    specdec.wrap(model, drafter="ngram", policy=FixedPolicy(6, 4, 3))
    output = model.generate(ids, max_new_tokens=60, do_sample=False)[0].tolist()
    stats, told = specdec.stats(model), total([response(output[5:], output[:5])], NgramDrafter())
    assert (told["tokens"], told["steps"], told["accepted"]) == (stats.tokens, stats.steps, stats.accepted)
    assert 0 < stats.accepted < 59


def test_learning_goes_on_from_session_to_session_but_not_between_namespaces():
    answer = np.random.default_rng(0).permutation(50).tolist()
    first, again, elsewhere = (
        response(answer, session="a"),
        response(answer, session="b"),
        response(answer, namespace="x"),
    )
    sessions = replay([first, again, elsewhere, again], RecyclingDrafter(), BUDGET)
    assert list(sessions) == [("", "a"), ("", "b"), ("x", "s")]
    steps = [tally.steps for tally in sessions.values()]
    assert steps[0] == steps[2] == 50
    assert steps[1] < 2 * 25
    assert sessions["", "b"].tokens == 100


def test_a_drafter_is_asked_to_catch_up_then_to_draft_and_sees_the_end_once():
    asked = []

    class Asked(Drafter):
        def draft(self, contexts, budgets):
            asked.append((len(contexts[0].tokens), budgets[0].nodes, contexts[0].finished))
            return super().draft(contexts, budgets)

    replay([response([5, 6, 7])], Asked(lambda context: []), BUDGET)
    assert asked == [(3, 0, False), (3, 6, False), (4, 0, False), (4, 6, False), (5, 0, True)]


def test_catching_up_and_drafting_are_timed_apart(monkeypatch):
    clock = [0.0]

    class Slow(Drafter):
        def draft(self, contexts, budgets):
            clock[0] += 3e-6 if budgets[0].nodes else 5e-6
            return super().draft(contexts, budgets)

    monkeypatch.setattr("specdec.replay.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told = total([response([5, 6, 7]), response([5])], Slow(lambda context: []))
    assert told["draft_us_per_token"] == 2 * 3 / 4
    assert told["update_us_per_token"] == (3 + 1) * 5 / 4


def test_bytes_are_the_most_held_at_an_end_over_the_tokens_met():
    class Heavy(Drafter):
        held = 0

        def draft(self, contexts, budgets):
            self.held += 0 if budgets[0].nodes else 100
            return super().draft(contexts, budgets)

        @property
        def bytes_used(self):
            return self.held

    told = total([response([5, 6]), response([5, 6, 7], session="t")], Heavy(lambda context: []))
    assert told["bytes_per_token"] == 500 / 5
    assert [session["bytes_per_token"] for session in told["by_session"]] == [200 / 2, 500 / 5]
    assert total([response([5])], Drafter(lambda context: []))["bytes_per_token"] is None
    held = NgramDrafter()  # what belongs to the context is gone at once, and counts too
    assert total([response([5] * 1000)], held)["bytes_per_token"] > 10 + held.bytes_used / 1000


def test_each_session_has_its_figures_and_the_total_is_their_sum():
    answers = [response([5, 6, 7]), response([8], session="t"), response([5, 6, 7, 8])]
    prophet = Drafter(lambda context: [[int(context.tokens[-1]) + 1] * 1])
    told = total(answers, prophet)
    assert told["sessions"] == 2
    assert [(each["namespace"], each["session"], each["tokens"]) for each in told["by_session"]] == [
        ("", "s", 7),
        ("", "t", 1),
    ]
    for key in ("tokens", "steps", "drafted", "accepted"):
        assert told[key] == sum(each[key] for each in told["by_session"])


def test_projected_speed_is_plain_time_over_the_passes_time():
    prophet = Drafter(lambda context: [[7, 7]])
    sessions = replay([response([7] * 7)], prophet, BUDGET)  # the prompt's pass, then two trees of three tokens
    assert result("", sessions, {1: 1.0, 3: 1.5})["projected_speed"] == 6 / 3
    assert result("", sessions, {1: 1.0, 2: 1.5, 4: 2.5})["projected_speed"] == 6 / 4
    assert "projected_speed" not in result("", sessions)
    assert Tally(tokens=1, steps=1).figures({1: 1.0})["projected_speed"] is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"seconds": 3}', '{"seconds": {"one": 1}}', '{"seconds": {"2": 1, "9": 1}}',
                '{"seconds": {"1": 1, "8": 1}}', '{"seconds": {"1": 0, "9": 1}}']
)  # fmt: skip
def test_a_cost_that_does_not_reach_is_refused(tmp_path, content):
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"cost\.json"):
        read_cost(path, 9)
    path.write_text('{"machine": {}, "seconds": {"1": 0.5, "16": 1}}')
    assert read_cost(path, 9) == {1: 0.5, 16: 1.0}


def test_the_recording_knows_one_candidate_after_each_accepted_node():
    verifier, context = RecordedVerifier(np.array([5, 6, 7, 8]), topk=8), Context([1, 2])
    assert isinstance(verifier, Verifier)
    first = verifier.first(context)
    assert (first.prompt, first.tree.tokens.tolist(), first.tokens.tolist()) == (True, [2], [5])
    assert first.candidates.tolist() == [[5]]
    context.extend(first)
    tree = DraftTree(np.array([5, 9, 6, 7]), np.array([-1, 0, 0, 1]), np.ones(4, np.float32), ("",) * 4)
    (verdict,) = verifier.verify([context], [tree])
    assert verdict.tree is tree
    assert (verdict.path.tolist(), verdict.tokens.tolist()) == ([0, 2], [6, 7])
    assert verdict.candidates.tolist() == [[6], [-1], [7], [-1]]
    assert RecordedVerifier(np.array([5])).first(Context([1])).candidates is None


def test_another_reconstruction_is_told_with_session_and_position(monkeypatch):
    from specdec import trees

    def follow(tokens, parents, continuation):
        return np.arange(min(2, len(tokens), len(continuation) + 1))

    monkeypatch.setattr(trees, "follow", follow)
    wrong = Drafter(lambda context: [[int(context.tokens[-1]) + 1]])
    with pytest.raises(ValueError, match="line of s, session s: another token at position 3"):
        replay([response([5, 6, 9, 3, 4])], wrong, BUDGET)


@pytest.mark.parametrize(
    ("guess", "said"),
    [([[1, 2, 3, 4, 5]], "deep"), ([[1], [2], [3], [4]], "child"), ([[-3]], "token")],
)
def test_an_unsound_tree_is_told(guess, said):
    with pytest.raises(ValueError, match="line of s, session s: drafter guesser: ") as told:
        replay([response([5, 6])], Drafter(lambda context: guess), BUDGET)
    assert said in str(told.value)


def test_a_failing_part_of_a_merged_drafter_is_told():
    def fail(context):
        raise KeyError("lost")

    with pytest.raises(ValueError, match="drafter guesser: KeyError: 'lost'"):
        replay([response([5, 6])], MergedDrafter([NgramDrafter(), Drafter(fail)]), BUDGET)


def test_hidden_states_are_not_recorded():
    drafter = Drafter(lambda context: [])
    drafter.hidden = True
    with pytest.raises(ValueError, match="guesser learns from the target's hidden states"):
        replay([response([5, 6])], drafter, BUDGET)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["replay", *map(str, arguments)], catch_exceptions=False)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def ids(tmp_path):
    """Two files of token ids, the second repeating what the first says."""
    rows = [{"session": name, "prompt": [1, 2], "response": [*range(5, 25), n]} for n, name in enumerate("abb", 30)]
    return write(tmp_path / "one.jsonl", *rows), write(tmp_path / "two.jsonl", rows[0])


def test_the_command_writes_its_figures(tmp_path, ids):
    out, cost = tmp_path / "out.json", tmp_path / "cost.json"
    cost.write_text('{"seconds": {"1": 0.02, "33": 0.04}}')
    run = invoke(*ids, "--drafters", "ngram,recycling", "--cost", cost, "--json", out)
    assert run.exit_code == 0
    report = json.loads(out.read_text())
    assert [row["drafter"] for row in report["results"]] == ["ngram", "recycling"]
    ngram, recycling = report["results"]
    keys = ["drafter", "sessions", "tokens", "steps", "tokens_per_step", "drafted", "accepted", "draft_us_per_token"]
    assert {*keys, "update_us_per_token", "bytes_per_token", "projected_speed", "by_session"} == set(ngram)
    assert (ngram["sessions"], ngram["tokens"]) == (3, 4 * 21)
    assert recycling["tokens_per_step"] > ngram["tokens_per_step"] == 1.0
    assert (report["nodes"], report["depth"], report["width"]) == (32, 16, 4)
    cold, warm, other = (session["tokens_per_step"] for session in recycling["by_session"])
    assert warm > cold == other
    assert "recycling" in run.stdout


def test_one_namespace_makes_one_memory_of_all_files(tmp_path, ids):
    out = tmp_path / "out.json"
    assert invoke(*ids, "--drafters", "recycling", "--namespace", "all", "--json", out).exit_code == 0
    (row,) = json.loads(out.read_text())["results"]
    assert [(each["namespace"], each["session"], each["tokens"]) for each in row["by_session"]] == [
        ("all", "a", 42),
        ("all", "b", 42),
    ]
    assert invoke(*ids, "--drafters", "recycling", "--nodes", 0, "--json", out).exit_code == 0
    assert json.loads(out.read_text())["results"][0]["tokens_per_step"] == 1.0


def test_the_command_reads_transcripts_with_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    assert AutoTokenizer.from_pretrained(tmp_path / "words").chat_template is None
    said = [{"role": "user", "content": "a b "}, {"role": "assistant", "content": "a b c"}]
    path, out = write(tmp_path / "chat.jsonl", {"session": "s", "messages": said}), tmp_path / "out.json"
    arguments = (path, "--tokenizer", tmp_path / "words", "--drafters", "ngram", "--json", out)
    assert invoke(*arguments).exit_code == 0
    assert json.loads(out.read_text())["results"][0]["tokens"] == 3


@pytest.mark.parametrize(
    ("line", "arguments", "said"),
    [
        ({"prompt": [1], "response": "text"}, [], "trace.jsonl, line 2: no recorded answer"),
        ({"prompt": [1], "response": [2]}, ["--drafters", "oracle"], "drafter='oracle': known names are"),
        ({"prompt": [1], "response": [2]}, ["--tokenizer", "/nowhere"], "/nowhere"),
        ({"prompt": [1], "response": [2]}, ["--cost", "/nowhere.json"], "/nowhere.json"),
        ({"prompt": [1], "response": [2]}, ["/nowhere.jsonl"], "/nowhere.jsonl"),
        ({"prompt": [1], "response": [2]}, ["--json", "/nowhere/out.json"], "/nowhere/out.json"),
    ],
)
def test_the_command_tells_mistakes_in_a_line(tmp_path, line, arguments, said):
    path = write(tmp_path / "trace.jsonl", {"prompt": [1], "response": [2]}, line)
    run = invoke(path, *arguments)
    assert run.exit_code == 1
    assert run.stderr.lstrip().startswith("error: ")
    assert said in run.stderr
    assert "Traceback" not in run.output


def test_a_file_without_answers_is_told(tmp_path):
    run = invoke(write(tmp_path / "trace.jsonl", {"prompt": [1], "response": []}))
    assert (run.exit_code, run.stderr) == (1, f"error: no recorded answers in {tmp_path / 'trace.jsonl'}\n")
