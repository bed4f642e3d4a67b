"""The official client gets what ``generate`` writes: whole and streamed, drawn, stopped, predicted, as calls."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch

from specdec import timing
from specdec.server.grammars import held_to
from specdec.server.schema import Message
from tests import served, tiny
from tests.served import NAME, Served

HELLO = [{"role": "user", "content": "hello"}]


_unhurried = pytest.fixture(autouse=True, scope="module")(tiny.unhurried)


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    """One server for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(timing, "TIMING_SECONDS", 0.0)
        with served.served(served.model()) as made:
            yield made


@pytest.fixture(scope="module")
def client(running: Served) -> Any:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


def ask(client: Any, messages: Any = HELLO, **options: Any) -> Any:
    return client.chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 40, "temperature": 0, **options}
    )


def generated(running: Served, prompt: list[int], seed: int = 0, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    output = running.model.generate(ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 40, **options})
    text: list[int] = output[0, len(prompt) :].tolist()
    return text


def plain(running: Served, messages: Any = HELLO, **options: Any) -> str:
    prompt = running.pool.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return spelt(running, generated(running, prompt, **options))


def spelt(running: Served, ids: list[int]) -> str:
    text: str = running.pool.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def test_it_writes_what_generate_writes(running: Served, client: Any) -> None:
    first = ask(client)
    assert first.choices[0].message.content == plain(running)
    assert first.choices[0].message.role == "assistant"
    assert first.choices[0].finish_reason == "length"
    assert (first.object, first.model) == ("chat.completion", NAME)
    again = ask(client)
    assert again.choices[0].message.content == plain(running)
    usage = again.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 40, 51)
    assert usage.specdec["steps"] < 30, "what was written before is drafted"
    assert usage.specdec["tokens_per_step"] == pytest.approx(40 / usage.specdec["steps"])


def test_usage_tells_what_need_not_be_read_again(client: Any) -> None:
    said = [{"role": "user", "content": "the same long question, word for word, " * 3}]
    usages = [ask(client, messages=said).usage for _ in range(2)]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, usages[1].prompt_tokens - 1]


@pytest.mark.parametrize("options", [{}, {"stop": "U"}, {"n": 3, "temperature": 1.0, "seed": 5}], ids=str)
def test_a_stream_says_the_same(running: Served, client: Any, options: dict[str, Any]) -> None:
    whole = ask(client, **options)
    texts, ends, roles = [""] * len(whole.choices), {}, {}
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        roles.setdefault(choice.index, choice.delta.role)
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
        assert chunk.usage is None
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert set(roles.values()) == {"assistant"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4


def test_a_seed_is_that_of_generate(running: Served, client: Any) -> None:
    for seed in (3, 4):
        wanted = plain(running, seed=seed, do_sample=True, temperature=0.8, top_p=0.9, top_k=0)
        assert ask(client, seed=seed, temperature=0.8, top_p=0.9).choices[0].message.content == wanted
    texts = {ask(client, temperature=1.0).choices[0].message.content for _ in range(4)}
    assert len(texts) == 4, "without a seed every draw is another"


def test_choices_have_one_seed_after_another(running: Served, client: Any) -> None:
    choices = ask(client, n=3, seed=7, temperature=1.0).choices
    wanted = [plain(running, seed=7 + n, do_sample=True, top_k=0) for n in range(3)]
    assert [choice.message.content for choice in choices] == wanted


def test_a_temperature_near_zero_is_none(running: Served, client: Any) -> None:
    assert ask(client, temperature=1e-300).choices[0].message.content == plain(running)


def test_stop_strings_are_not_shown(running: Served, client: Any) -> None:
    text = plain(running)
    stop = text[12:14]
    choice = ask(client, stop=[stop, "never there"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_log_probabilities_are_the_models_own(running: Served, client: Any) -> None:
    choice = ask(client, temperature=0.7, top_p=0.5, seed=2, logprobs=True, top_logprobs=3).choices[0]
    prompt = running.pool.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    ids = generated(running, prompt, 2, do_sample=True, temperature=0.7, top_p=0.5, top_k=0)
    with torch.no_grad():
        logits = running.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    likely = logits.log_softmax(-1)
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == choice.message.content
    for entry, id, row in zip(entries, ids, likely, strict=True):
        assert entry.logprob == pytest.approx(float(row[id]), abs=1e-4)
        assert [best.logprob for best in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    streamed = ask(client, temperature=0.7, top_p=0.5, seed=2, logprobs=True, top_logprobs=3, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for part in parts if part for entry in part.content] == entries


def test_log_probabilities_end_where_the_text_does(running: Served, client: Any) -> None:
    text = plain(running)
    choice = ask(client, stop=text[12:14], logprobs=True).choices[0]
    shown = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace")
    assert shown == choice.message.content
    assert choice.logprobs.content[0].top_logprobs == []


class TestCompletions:
    def test_texts_and_ids(self, running: Served, client: Any) -> None:
        ids = running.pool.tokenizer.encode("abc")
        wanted = spelt(running, generated(running, ids, max_new_tokens=16))
        for prompt in ("abc", ids, ["abc"], [ids]):
            answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
            assert [choice.text for choice in answer.choices] == [wanted]
        assert answer.object == "text_completion"

    def test_several(self, running: Served, client: Any) -> None:
        answer = client.completions.create(model=NAME, prompt=["abc", "xyz"], n=2, temperature=0, max_tokens=9)
        ids = [running.pool.tokenizer.encode(text) for text in ("abc", "xyz") for _ in range(2)]
        wanted = [spelt(running, generated(running, each, max_new_tokens=9)) for each in ids]
        assert [choice.text for choice in answer.choices] == wanted
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 36)

    def test_streamed_with_log_probabilities(self, client: Any) -> None:
        options = {"model": NAME, "prompt": "abc", "temperature": 0, "logprobs": 2, "max_tokens": 12}
        whole = client.completions.create(**options).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        offsets = [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset]
        assert offsets == whole.logprobs.text_offset == sorted(offsets)
        assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs) == 12
        assert all(len(best) <= 2 for best in whole.logprobs.top_logprobs)


def test_a_prediction_is_drafted(client: Any) -> None:
    """A right one saves steps, a wrong one changes nothing; in a namespace of their own nothing else is known."""
    question = [{"role": "user", "content": "never asked before"}]
    text = ask(client, question, user="one").choices[0].message.content
    assert ask(client, question, user="two").usage.completion_tokens_details.accepted_prediction_tokens == 0
    right = ask(client, question, user="three", prediction={"type": "content", "content": text})
    wrong = ask(client, question, user="four", prediction={"type": "content", "content": "something else " * 4})
    assert right.choices[0].message.content == wrong.choices[0].message.content == text
    details = right.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 10
    assert details.rejected_prediction_tokens >= 0
    assert right.usage.specdec["steps"] <= 40 - details.accepted_prediction_tokens
    assert wrong.usage.completion_tokens_details.accepted_prediction_tokens < 5


def penalised(running: Served, frequency: float, presence: float, bias: dict[int, float]) -> str:
    """Greedy, token by token, by OpenAI's formula."""
    ids = prompt = running.pool.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    for _ in range(40):
        scores = running.model(torch.tensor([ids])).logits[0, -1]
        written = torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.long), minlength=len(scores))
        scores = scores - frequency * written - presence * (written > 0)
        for id, value in bias.items():
            scores[id] += value
        ids = [*ids, int(scores.argmax())]
    return spelt(running, ids[len(prompt) :])


@pytest.mark.parametrize(
    ("frequency", "presence", "bias"),
    [(0.5, 0.0, {}), (0.0, 1.5, {}), (-0.3, 0.2, {70: 0.1, 1: -100.0}), (0, 0, {70: 9})],
)
def test_penalties_are_openais(
    running: Served, client: Any, frequency: float, presence: float, bias: dict[int, float]
) -> None:
    options = {"frequency_penalty": frequency, "presence_penalty": presence, "logit_bias": bias}
    wanted = penalised(running, frequency, presence, bias)
    assert wanted != plain(running)
    assert ask(client, **options).choices[0].message.content == wanted


class Shape(pydantic.BaseModel):
    """What an answer is to look like."""

    name: Literal["ada", "bob"]
    known: bool


class TestJson:
    def test_of_a_schema(self, running: Served, client: Any) -> None:
        pytest.importorskip("xgrammar")
        answer = client.chat.completions.parse(
            model=NAME, messages=HELLO, response_format=Shape, n=2, seed=1, temperature=1, logprobs=True
        )
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Shape)
            assert choice.finish_reason == "stop"
            assert len(choice.logprobs.content) == len(choice.message.content)
        grammar = running.service._grammars.json(openai.pydantic_function_tool(Shape)["function"]["parameters"])
        text = plain(running, logits_processor=[held_to(grammar)], do_sample=True, seed=1, top_k=0, max_new_tokens=99)
        assert answer.choices[0].message.content == text

    def test_any_object(self, client: Any) -> None:
        pytest.importorskip("xgrammar")
        chunks = ask(client, response_format={"type": "json_object"}, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith(("{}", '{"'))

    def test_of_what_is_no_schema(self, client: Any) -> None:
        pytest.importorskip("xgrammar")
        wanted = {"name": "x", "schema": {"type": "none of these"}}
        with pytest.raises(openai.BadRequestError, match="no grammar can be made") as error:
            ask(client, response_format={"type": "json_schema", "json_schema": wanted})
        assert error.value.param == "response_format"

    def test_without_xgrammar(self, running: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running.service._grammars, "_compiler", None)
        monkeypatch.setitem(sys.modules, "xgrammar", None)
        with pytest.raises(openai.BadRequestError, match="install xgrammar") as error:
            ask(client, response_format={"type": "json_object"})
        assert error.value.param == "response_format"


TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
WRITTEN = 'So: <tool_call>{"name": "look", "arguments": {"at": "the é"}}</tool_call>'


@pytest.fixture(scope="module")
def calling() -> Iterator[Any]:
    """A client of a server whose model calls a tool."""
    asked = served.tokenizer().apply_chat_template(HELLO, tools=[TOOL], add_generation_prompt=True)["input_ids"]
    with served.served(served.scripted(WRITTEN, len(asked))) as made:
        yield openai.OpenAI(base_url=f"{made.url}/v1", api_key="any", max_retries=0)


class TestTools:
    def test_whole(self, calling: Any) -> None:
        choice = ask(calling, tools=[TOOL], max_tokens=100).choices[0]
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "look")
        assert json.loads(call.function.arguments) == {"at": "the é"}
        assert (choice.message.content, choice.finish_reason) == ("So: ", "tool_calls")

    def test_streamed(self, calling: Any) -> None:
        chunks = [chunk.choices[0] for chunk in ask(calling, tools=[TOOL], max_tokens=100, stream=True)]
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert (call.index, call.function.name) == (0, "look")
        assert json.loads(call.function.arguments) == {"at": "the é"}
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "So: "
        assert chunks[-1].finish_reason == "tool_calls"

    def test_none_are_looked_for_where_none_are_offered(self, calling: Any) -> None:
        message = ask(calling, tools=[TOOL], tool_choice="none", max_tokens=100).choices[0].message
        assert message.tool_calls is None
        assert WRITTEN.endswith(message.content[20:])


def test_messages_reach_the_template_as_it_expects_them(running: Served) -> None:
    """Parts are joined, arguments are objects, developers are the system."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "good"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    ids = running.service._rendered([Message.model_validate(message) for message in messages], None)
    shown = '<s>be good<a><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><t>done<a>'
    assert spelt(running, ids) == shown


def test_padding_in_a_prompt_is_text(running: Served, client: Any) -> None:
    """Else such a prompt could not be decoded beside others, and would hold them up."""
    messages = [{"role": "user", "content": "a<pad>b"}]
    assert ask(client, messages).choices[0].message.content == plain(running, messages)
    assert not running.pool.stats.reasons


def test_facts(running: Served, client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'an/other'"):
        client.models.retrieve("an/other")
    ask(client)
    text = client.with_options().get("/../metrics", cast_to=str)
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.M))
    assert float(values["specdec_tokens_total"]) > 40
    assert (values["specdec_pool_rows"], values["specdec_pool_waiting"]) == ("0", "0")
    assert float(values['specdec_pool_requests_total{outcome="finished"}']) > 1
    assert client.get("/../health", cast_to=object) == {"status": "ok"}


@pytest.mark.real
def test_the_demo_model() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from specdec.demo import demo_path

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    model = AutoModelForCausalLM.from_pretrained(demo_path())
    messages = [{"role": "user", "content": "Name three colours."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    with served.served(model, tokenizer=tokenizer) as made:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="any", max_retries=0)
        text = "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(client, messages, max_tokens=30, stream=True)
        )
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert text == ask(client, messages, max_tokens=30).choices[0].message.content
