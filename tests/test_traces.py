"""Readers of recorded conversations: every format gives the prompts that a model would have been given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specdec import traces

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template=None):
    """A token for every byte, and <s> before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=template)


@pytest.fixture
def trace(tmp_path):
    """A function that writes lines, objects or text, to a file."""

    def write(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return write


def texts(responses, tokenizer):
    """What was asked and answered, as a reader sees it."""
    return [(tokenizer.decode(response.prompt), tokenizer.decode(response.tokens)) for response in responses]


def test_rows_of_text_come_in_order(trace):
    tokenizer = byte_tokenizer()
    path = trace(
        {"session": "one", "prompt": "ask", "response": "say"},
        "",
        {"session": "two", "prompt": "größe", "response": "ß"},
        {"session": "one", "prompt": "more", "response": ""},
        {"prompt": "who", "response": "none"},
    )
    responses = list(traces.read(path, tokenizer))
    assert texts(responses, tokenizer) == [("<s>ask", "say"), ("<s>größe", "ß"), ("<s>who", "none")]
    assert [response.session for response in responses] == ["one", "two", f"{path}, line 5"]
    assert [response.where for response in responses] == [f"{path}, line {line}" for line in (1, 3, 5)]
    assert {response.namespace for response in responses} == {str(path)}
    assert {response.namespace for response in traces.read(path, tokenizer, "all")} == {"all"}


def test_rows_of_token_ids_need_no_tokenizer(trace):
    (response,) = traces.read(trace({"session": "s", "prompt": [5, 6], "response": [7, 0]}), None)
    assert response.prompt.tolist() == [5, 6]
    assert response.tokens.tolist() == [7, 0]
    assert response.prompt.dtype == response.tokens.dtype == np.int64


CHAT = [("system", "Be."), ("user", "Do?"), ("assistant", "Do."), ("tool", "done"), ("assistant", "Be.")]


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_each_assistant_message_answers_all_before_it(trace):
    tokenizer, path = byte_tokenizer(TEMPLATE), trace({"session": "chat", "messages": messages(*CHAT)})
    assert texts(traces.read(path, tokenizer), tokenizer) == [
        ("<system>Be.<user>Do?<assistant>", "Do."),
        ("<system>Be.<user>Do?<assistant>Do.<tool>done<assistant>", "Be."),
    ]


def test_without_a_template_contents_are_joined(trace):
    tokenizer, path = byte_tokenizer(), trace({"session": "chat", "messages": messages(*CHAT)})
    assert texts(traces.read(path, tokenizer), tokenizer) == [("<s>Be.Do?", "Do."), ("<s>Be.Do?Do.done", "Be.")]


def test_an_opening_or_empty_answer_is_only_context(trace):
    tokenizer = byte_tokenizer(TEMPLATE)
    said = messages(("assistant", "Hello"), ("user", "Do?"), ("assistant", ""), ("user", "Well?"), ("assistant", "Yes"))
    whole = "<assistant>Hello<user>Do?<assistant><user>Well?<assistant>"
    assert texts(traces.read(trace({"messages": said}), tokenizer), tokenizer) == [(whole, "Yes")]


def test_a_reference_is_the_one_answer(trace):
    tokenizer = byte_tokenizer(TEMPLATE)
    asked = messages(("user", "Two?"), ("assistant", "2"), ("user", "Three?"))
    path = trace({"id": "q/1", "workload": "math", "messages": asked, "reference": "3", "prediction": "33"})
    (response,) = traces.read(path, tokenizer)
    assert texts([response], tokenizer) == [("<user>Two?<assistant>2<user>Three?<assistant>", "3")]
    assert response.session == "q/1"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "Expecting property name"),
        ("[1, 2]", "'list' object"),
        ({"session": "s", "prompt": "ask"}, "it has no 'response'"),
        ({"id": "spec_bench/1", "turns": ["Compose"]}, "it has no 'prompt'"),
        ({"prompt": "ask", "response": 5}, "a text was due where a int stands"),
        ({"prompt": [], "response": "x"}, "the prompt is empty"),
        ({"prompt": [1], "response": [1, -2]}, "whole numbers from 0"),
        ({"prompt": [1], "response": [True]}, "whole numbers from 0"),
        ({"messages": messages(("user", "Do?"))}, "no assistant message"),
        ({"messages": [{"role": "user"}]}, "it has no 'content'"),
        ({"messages": [*messages(("user", "Do?")), {"role": "assistant", "content": None}]}, "a NoneType stands"),
        ({"messages": messages(("clown", "Ha")), "reference": "ha"}, "no clowns"),
    ],
)
def test_a_line_without_an_answer_is_told_with_file_and_line(trace, line, said):
    path = trace({"session": "s", "prompt": "ask", "response": "say"}, line)
    with pytest.raises(ValueError, match="no recorded answer") as told:
        list(traces.read(path, byte_tokenizer(TEMPLATE)))
    assert str(told.value).startswith(f"{path}, line 2: ")
    assert said in str(told.value)


def test_text_without_a_tokenizer_is_told(trace):
    with pytest.raises(ValueError, match=r"line 1.*needs a tokenizer"):
        list(traces.read(trace({"prompt": "ask", "response": "say"}), None))


def test_a_missing_file_is_told():
    with pytest.raises(FileNotFoundError):
        list(traces.read(Path("/nowhere.jsonl"), None))
