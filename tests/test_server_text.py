"""Pieces of text, stop strings and calls of tools are the same however a text is cut into tokens."""

from __future__ import annotations

import json
import random

import pytest
import torch

from specdec.server.choice import Choice, Piece, Token
from specdec.server.text import Cut, Spelling, Stopping, beginning
from specdec.server.tools import ToolCall, ToolCalls, parsed
from tests import served

TEXTS = ["plain", "zwölf Boxkämpfer → 日本 🙂 end", "tail é", "a\n\n b  c", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_spelt_pieces_make_the_text(text: str) -> None:
    tokenizer = served.tokenizer()
    spelling = Spelling(tokenizer)
    pieces = [spelling.add(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) + spelling.end() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_never_comes_is_not_waited_for() -> None:
    tokenizer = served.tokenizer()
    start = tokenizer.encode("é")[0]
    spelling = Spelling(tokenizer)
    assert "".join(spelling.add(start) for _ in range(40)) != ""
    ids = [*tokenizer.encode("a"), served.END, start]
    spelling = Spelling(tokenizer)
    assert "".join(map(spelling.add, ids)) == "a"
    assert spelling.end() == "\N{REPLACEMENT CHARACTER}"


def test_beginnings() -> None:
    assert beginning("one EN", ["END"]) == 2
    assert beginning("one END", ["END"]) == 0  # whole ones are found, not held
    assert beginning("aab", ["aabx", "b!"]) == 3
    assert beginning("", ["END"]) == beginning("abc", []) == 0


@pytest.mark.parametrize("seed", range(20))
def test_text_is_cut_at_the_first_stop_string(seed: int) -> None:
    """Against a search in what had been written when the first one was complete."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abc") for _ in range(60))
    stops = ["".join(rng.choice("abc") for _ in range(rng.randint(2, 5))) for _ in range(rng.randint(1, 3))]
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    expected = text[: min(i for s in stops if (i := text[: ends[0]].find(s)) >= 0)] if ends else text
    cut, shown = Cut(stops), ""
    for letter in text:
        shown += cut.add(letter)
        assert expected.startswith(shown)
    assert cut.found == bool(ends)
    assert shown + cut.end() == expected


def test_the_rule_stops_at_the_token_that_completes_a_stop_string() -> None:
    tokenizer = served.tokenizer()
    ids = tokenizer.encode("xxENxENDyyEND")
    rule = Stopping(tokenizer, ["END"])
    stopped = [bool(rule(torch.tensor([ids[: n + 1]]), None)[0]) for n in range(len(ids))]
    assert stopped.index(True) == len("xxENxEND") - 1


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "<b>", "n": 2}}\n</tool_call>'


def split(text: str, size: int) -> list[str | ToolCall]:
    calls = ToolCalls(known=True)
    found = [part for n in range(0, len(text), size) for part in calls.add(text[n : n + size])]
    return [*found, calls.end()]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_told_from_text(size: int) -> None:
    found = split(f"I <b>look</tool_call>: {CALL} and {CALL}<tool", size)
    calls = [part for part in found if isinstance(part, ToolCall)]
    assert "".join(part for part in found if isinstance(part, str)) == "I <b>look</tool_call>:  and <tool"
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("look", {"at": "<b>", "n": 2})] * 2
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("inside", ["", "no JSON", "[]", "3", '{"arguments": {}}', '{"name": 3}', "[" * 100_000])
def test_what_is_no_call_stays_text(inside: str) -> None:
    text = f"a<tool_call>{inside}</tool_call>b"
    assert "".join(map(str, split(text, 50))) == text


def test_arguments() -> None:
    assert parsed('{"name": "now"}').arguments == "{}"
    assert parsed('{"name": "now", "arguments": "{\\"a\\": 1}"}').arguments == '{"a": 1}'


def test_without_tools_calls_are_text() -> None:
    calls = ToolCalls(known=False)
    assert [*calls.add(CALL), calls.end()] == [CALL, ""]


def test_why_a_choice_ends() -> None:
    tokenizer = served.tokenizer()

    def told(text: str, *more: int) -> Piece:
        choice, piece = Choice(tokenizer, ["END"], {served.END}, calls=True), Piece()
        for id in [*tokenizer.encode(text), *more]:
            piece += choice.add(Token(id))
        return piece + choice.end()

    assert (told("abc").text, told("abc").finish) == ("abc", "length")
    assert (told("abc", served.END).text, told("abc", served.END).finish) == ("abc", "stop")
    assert (told("abcEND").text, told("abcEND").finish) == ("abc", "stop")
    assert (told("abcEN").text, told("abcEN").finish) == ("abcEN", "length")
    assert told(CALL, served.END).finish == "tool_calls"
    assert told(CALL).finish == "length"
    assert told("<tool_call>{", served.END).text == "<tool_call>{"
