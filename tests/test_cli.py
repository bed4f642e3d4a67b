"""The command line on a tiny model: the text is the model's, figures come out, mistakes are told in a line."""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specdec
from specdec import cli, demo
from specdec.bench import run, workloads
from specdec.bench.methods import Method, prepare
from specdec.commands import console
from specdec.policies import FixedPolicy
from specdec.printer import Printer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}: "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama over bytes, and a tokenizer that has every byte."""
    directory = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def short(monkeypatch):
    """Our prompts, cut to their first letters: there are a thousand bytes in some, and each is a token here."""

    def own(names=()):
        prompts = workloads_own(names)
        return [
            dataclasses.replace(p, messages=({"role": "user", "content": p.messages[0]["content"][:16]},))
            for p in prompts
        ]

    workloads_own = workloads.own
    monkeypatch.setattr(workloads, "own", own)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def plain_text(directory, prompt, **arguments):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(arguments.pop("seed", 0))
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, **arguments})
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("drafter", ["auto", "ngram", "recycling", "none"])
def test_generate_prints_the_models_text(tiny, drafter):
    result = invoke("generate", "abcabcab", "--model", tiny, "--max-new-tokens", 40, "--drafter", drafter)
    assert result.exit_code == 0
    assert result.stdout == plain_text(tiny, "abcabcab", max_new_tokens=40) + "\n"
    count, passes = re.search(r"(\d+) tokens(?: in (\d+) passes)?", result.stderr).groups()
    assert count == "40"
    assert (passes is None) == (drafter == "none")  # how many there are goes by the clock
    assert passes is None or int(passes) <= 40
    assert "\x1b" not in result.output


def test_generate_samples_with_the_seed(tiny):
    wanted = plain_text(tiny, "xyxyx", max_new_tokens=30, do_sample=True, temperature=0.7, seed=5)
    arguments = ("generate", "xyxyx", "--model", tiny, "--max-new-tokens", 30, "--temperature", 0.7, "--plain")
    assert invoke(*arguments, "--seed", 5).output == wanted + "\n"
    assert invoke(*arguments, "--seed", 6).output != wanted + "\n"


def test_generate_uses_the_chat_template_where_there_is_one(tiny, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    arguments = ("generate", "hello", "--model", tmp_path, "--max-new-tokens", 20, "--plain")
    assert invoke(*arguments).stdout == plain_text(tiny, "hello: ", max_new_tokens=20) + "\n"
    assert invoke(*arguments, "--no-chat").stdout == plain_text(tiny, "hello", max_new_tokens=20) + "\n"


def test_on_a_terminal_tokens_have_their_drafters_colours(tiny, monkeypatch):
    monkeypatch.setattr(console, "output", Console(force_terminal=True, color_system="standard"))
    monkeypatch.setattr("specdec.speculate.ThroughputPolicy", lambda costs: FixedPolicy(8, 4, 2))  # whatever time it is
    arguments = ("generate", "abcabcab", "--model", tiny, "--max-new-tokens", 40)
    result = invoke(*arguments)
    assert "\x1b[32m" in result.stdout
    assert re.sub(r"\x1b\[[0-9;]*m", "", result.stdout) == plain_text(tiny, "abcabcab", max_new_tokens=40) + "\n"
    shares = [int(share) for share in re.findall(r"(\d+)%", result.stderr)]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert len(shares) > 1
    assert "\x1b" not in invoke(*arguments, "--plain").output


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def test_each_token_has_its_own_drafters_colour_and_characters_come_whole():
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    text, guessed = "a\n\tbé\fc\n", ["", "", "one", "two", "", "one", "", "two", "one"]
    stats = specdec.Stats()
    printer = Printer(terminal, Bytes(), stats)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    stats.sources = [[]]
    for token, source in zip(text.encode(), guessed, strict=True):
        stats.sources[0].append(source)
        printer.put(torch.tensor([token]))
    printer.end()
    green, cyan, end = "\x1b[32m", "\x1b[36m", "\x1b[0m"
    # The two bytes of é are the target's and the first drafter's: it comes with its last byte.
    pieces = [
        "a\n",
        f"{green}\t{end}",
        f"{cyan}b{end}",
        f"{green}é{end}",
        "\f",
        f"{cyan}c{end}",
        f"{green}\n{end}",
        "\n",
    ]
    assert terminal.file.getvalue() == "".join(pieces)
    assert printer.legend().plain == "target 44%  one 33%  two 22%"


@pytest.mark.parametrize(("arguments", "said"), [(["--drafter", "oracle"], "oracle"), (["--chat"], "no chat template")])
def test_generate_tells_mistakes_in_a_line(tiny, arguments, said):
    result = invoke("generate", "hello", "--model", tiny, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_index_build_makes_an_index_of_a_corpus(tiny, tmp_path):
    pytest.importorskip("pydivsufsort", reason="sorts the suffixes")
    text, rows, out = tmp_path / "text.txt", tmp_path / "rows.jsonl", tmp_path / "index"
    text.write_text("abab")
    rows.write_text('{"text": "abc"}\n{"text": "xy"}\n')
    arguments = ("index", "build", text, rows, "--tokenizer", tiny, "--out", out)
    assert f"{out}:3documents,9tokens" in "".join(invoke(*arguments).stdout.split())  # lines end where they are full
    corpus = importlib.import_module("specdec.drafters.corpus").Corpus.open(out)
    assert (corpus.documents, len(corpus.suffixes)) == (3, 9)
    again = invoke(*arguments)
    assert (again.exit_code, again.stderr.startswith("error: ")) == (1, True)
    assert "exists" in again.stderr


def test_demo_path_is_the_last_line(tiny, monkeypatch):
    monkeypatch.setattr(demo, "demo_path", lambda: demo.Path(tiny))
    assert invoke("demo", "--path").stdout.splitlines()[-1] == tiny


def test_demo_shows_every_kind_of_work(tiny, monkeypatch, short):
    monkeypatch.setattr(demo, "demo_path", lambda: demo.Path(tiny))
    result = invoke("demo", "--quick")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len({row[0] for row in rows if row[1:2] == ["auto+kernels"]}) >= 7
    assert all(row[3] == "yes" for row in rows if row[1:2] == ["auto+kernels"])


def test_demo_fails_when_tokens_differ(tiny, monkeypatch, short):
    class Liar:
        def __init__(self, model):
            self.model, self.device = model, model.device

        def generate(self, ids, **arguments):
            output = self.model.generate(ids, **arguments)
            output[0, -1] += 1
            return output

    lying = lambda model, name, *rest: prepare(model, name) if name == "plain" else Method(name, Liar(model))  # noqa: E731
    monkeypatch.setattr(run, "prepare", lying)
    monkeypatch.setattr(demo, "demo_path", lambda: demo.Path(tiny))
    result = invoke("demo", "--quick")
    assert result.exit_code == 1
    assert "differs: auto+kernels on chat (prompt 0): token 31" in result.stdout


def test_a_model_that_cannot_be_fetched_is_told_in_a_line(monkeypatch):
    def fail():
        raise demo.DemoError("cannot fetch the demo model")

    monkeypatch.setattr(demo, "demo_path", fail)
    result = invoke("generate", "hello")
    assert (result.exit_code, result.stderr) == (1, "error: cannot fetch the demo model\n")


def test_version_and_help_answer_at_once():
    assert re.fullmatch(r"specdec \d+\.\d+\.\d+\n", invoke("--version").stdout)
    code = "import sys; import specdec.cli; print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n", f"heavy imports at start-up, {time.perf_counter() - start:.1f} s"
    assert {"generate", "bench", "replay", "index", "demo"} <= set(invoke("--help").stdout.split())
