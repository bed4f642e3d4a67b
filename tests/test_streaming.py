"""Streamers hear what they would hear from plain ``generate``, and always hear the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, TextStreamer

import specdec
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, both, outcome, padded, prompt, quietly

POLICY = FixedPolicy(12, 5, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


class Recorder:
    """Everything that was put, and how often the end was told."""

    def __init__(self) -> None:
        self.puts: list[tuple[torch.Size, torch.dtype, Any]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert self.ends == 0
        self.puts.append((value.shape, value.dtype, value.tolist()))

    def end(self) -> None:
        self.ends += 1


class Raiser(LogitsProcessor):
    """Raises at its ``at``-th call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("enough")
        return scores


def heard(model: Any, arguments: dict[str, Any], drafter: Any = None) -> list[Recorder]:
    """What a plain and a speculating run put."""
    recorders: list[Recorder] = []

    def make() -> dict[str, Any]:
        recorders.append(Recorder())
        return {**arguments, "streamer": recorders[-1]}

    result = both(model, make, drafter=drafter, max_new_tokens=20)
    assert result.stats.accepted > 0 or drafter
    return [each for each in recorders if each.puts]


@pytest.mark.parametrize("drafter", [None, "auto"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"do_sample": True},
        {"repetition_penalty": 1.3},
        {"eos_token_id": [18, 70, 84]},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_the_same_puts_in_the_same_shapes(model: Any, arguments: dict[str, Any], drafter: Any) -> None:
    plain, ours = heard(model, {"input_ids": prompt(), **arguments}, drafter)
    assert ours.puts == plain.puts
    assert len(plain.puts) > 2
    assert ours.ends == plain.ends == 1


def test_a_prompt_of_embeddings(model: Any) -> None:
    plain, ours = heard(model, {"inputs_embeds": model.get_input_embeddings()(prompt())})
    assert ours.puts == plain.puts


def test_text_as_it_comes(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.tokenizer()
    both(
        model, lambda: {"input_ids": prompt(), "streamer": TextStreamer(tokenizer, skip_prompt=True)}, max_new_tokens=20
    )
    plain, ours, rest = capsys.readouterr().out.split("\n")
    assert ours == plain != rest == ""


def test_an_iterator_in_another_thread(model: Any) -> None:
    tokenizer = tiny.tokenizer()
    text = tokenizer.decode(model.generate(prompt(), max_new_tokens=20)[0])
    streamer = TextIteratorStreamer(tokenizer, timeout=300)
    with specdec.speculating(model, Oracle(), POLICY):
        arguments = {"inputs": prompt(), "streamer": streamer, "max_new_tokens": 20}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        assert "".join(streamer) == text
        thread.join()


@pytest.mark.parametrize("at", [1, 2, 8])
def test_the_end_is_told_when_a_processor_raises(model: Any, at: int) -> None:
    streamer = Recorder()
    known = Oracle(model.generate(prompt(), max_new_tokens=20).tolist())
    with specdec.speculating(model, known, POLICY), pytest.raises(ArithmeticError, match="enough"):
        model.generate(
            prompt(), streamer=streamer, logits_processor=LogitsProcessorList([Raiser(at)]), max_new_tokens=20
        )
    assert streamer.ends == 1
    assert len(streamer.puts) == at  # the prompt, and a token for every call that went well


def test_the_end_is_told_when_the_prompt_is_too_long() -> None:
    streamer = Recorder()
    with specdec.speculating(tiny.gpt2(), Oracle(), POLICY) as model, pytest.raises(IndexError):
        model.generate(prompt(70), streamer=streamer, max_new_tokens=4)
    assert streamer.ends == 1


def test_an_error_of_the_streamer_itself_comes_through(model: Any) -> None:
    class Closed(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.puts) == 3:
                raise BrokenPipeError

    streamer = Closed()
    with specdec.speculating(model, Oracle(), POLICY), pytest.raises(BrokenPipeError):
        model.generate(prompt(), streamer=streamer, max_new_tokens=20)
    assert streamer.ends == 1


def test_a_batch_is_refused_as_plain_generate_refuses_it(model: Any) -> None:
    def run() -> Any:
        return model.generate(**padded(9, 4), streamer=TextStreamer(tiny.tokenizer()), max_new_tokens=5)

    plain = outcome(run)
    with specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"):
        assert outcome(run) == plain
    assert plain[0] is ValueError


def test_a_streamer_that_takes_batches_gets_them(model: Any) -> None:
    plain, ours = heard(model, padded(9, 4), Oracle())
    assert ours.puts[0] == plain.puts[0]
    assert ours.puts == plain.puts


def test_a_fallback_streams_once(model: Any) -> None:
    streamer, plain = Recorder(), Recorder()
    model.generate(prompt(), streamer=plain, use_cache=False, max_new_tokens=6)
    with quietly(), specdec.speculating(model):
        model.generate(prompt(), streamer=streamer, use_cache=False, max_new_tokens=6)
    assert (streamer.puts, streamer.ends) == (plain.puts, 1)
