"""What measures long contexts: texts say what they ask for, a model learns it, caches forget it, a table shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import long_context
import long_documents
import needle
import numpy as np
import pytest
import torch
from tables import long
from transformers import DynamicCache

from specdec.attach import attach


@pytest.fixture(scope="module")
def text() -> needle.Text:
    return needle.text(1500, long_context.RECORDS, 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return needle.untrained(hidden=128)


def test_answers_are_where_the_text_says(text: needle.Text) -> None:
    """Each record is found in the text by its head, and names the next one."""
    assert len(text.tokens) == 1500
    told, answer = text.tokens.tolist(), text.answer(5, 3 * needle.SIZE).tolist()
    head = text.asked(5)[-1]
    for record in np.reshape(answer, (3, needle.SIZE)).tolist():
        heads = [i for i, token in enumerate(told) if token == head and told[i + 1] != needle.END]
        assert len(heads) == 1
        assert told[heads[0] + 1 : heads[0] + needle.SIZE + 2] == [*record, needle.END]
        head = record[-1]
    assert text.heads[8] == head


def test_training_reaches_far_and_its_loss_falls(tmp_path: Path) -> None:
    given = needle.batch(0)
    assert given.positions.max() > needle.FARTHEST // 8
    for tokens, gaps in zip(given.ids[:, 1:], given.positions.diff(), strict=True):
        assert tokens[gaps > 1].max() < needle.WORDS <= tokens[given.prompt - 1]  # no gap within a record
    model, state = needle.trained(tmp_path, 4, hidden=64)
    again, resumed = needle.trained(tmp_path, 4, hidden=64)
    assert state.figures == resumed.figures
    with torch.no_grad():
        before = float(needle.loss(needle.untrained(hidden=64), needle.batch(9)))
        assert float(needle.loss(model, needle.batch(9))) == float(needle.loss(again, needle.batch(9))) < before - 0.3


def test_a_window_forgets_and_a_large_enough_budget_does_not(
    model: Any, text: needle.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any model, what it knows with all retrieved is what it knows with all."""
    monkeypatch.setattr(long_context, "NEW_TOKENS", 12)
    ids = torch.from_numpy(text.tokens)[None]
    cache = long_context.fed(model, ids, DynamicCache(config=model.config), 512)
    full, eight, one, window = long_context.needles(model, text, cache, 4)
    assert full["recall"] == eight["recall"] == one["recall"] > window["recall"] + 0.1
    rows = long_context.decoding(model, text, cache, 1)
    assert [row["method"] for row in rows] == ["plain", "ngram", "triforce 8", "triforce 1", "both, by cost"]
    assert all(row["equal"] and row["tokens_per_step"] >= 1 for row in rows)
    assert rows[0]["speedup"] == rows[0]["tokens_per_step"] == 1


def test_windows_hold_as_much_behind_any_text() -> None:
    shape = long_context.synthetic(4096, 1, 1)
    short, far = ({row["drafter"]: row["bytes"] for row in long_context.memory(shape, n)} for n in (2400, 4000))
    assert short["LongSpec"] == far["LongSpec"]
    assert short["small model, window"] == far["small model, window"]
    assert short["RAPID"] == far["RAPID"]
    assert far["small model"] > 1.5 * short["small model"]
    assert far["the target itself"] > far["retrieved rows"]
    assert attach(shape, timed=False).form.level == "tree"


def test_the_table_shows_what_was_measured(tmp_path: Path) -> None:
    assert long.long_context(tmp_path) == "not measured yet"
    machine = {"model": "shape", "parameters": 2_000_000, "dtype": "float32", "attention": "sdpa", "device": "c"}
    decoding = {"context": 9, "equal": True, "right": 1.0, "tokens_per_second": 50.0, "tokens_per_step": 2.5}
    report = {
        "machine": machine | {"threads": 2, "torch": "1", "transformers": "2"}, "budget": 7, "window": 5,
        "trained": {"parameters": 1_400_000, "steps": 100},
        "passes": [
            {"context": 9, "cache": "retrieval", "bytes": 3e6, "seconds_1": 0.01, "seconds_8": 0.02,
             "seconds_build": 0.5}
        ],
        "memory": [{"context": n, "drafter": "all", "bytes": n * 1024} for n in (4, 9)],
        "needles": [{"context": 9, "cache": "full", "questions": 8, "recall": 1.0, "recall_next": 0.25}],
        "decoding": [
            decoding | {"method": "plain", "accepted": 0.0, "speedup": 1.0},
            decoding | {"method": "triforce 8", "accepted": 0.5, "speedup": 1.75},
            decoding | {"method": "ngram", "accepted": 0.5, "speedup": None, "equal": False},
        ],
    }  # fmt: skip
    (tmp_path / "some.json").write_text(json.dumps(report))
    shown = long.long_context(tmp_path).splitlines()
    for line in (
        "| retrieval | 10.0 / 20.0 / 3 |",
        "Building the retrieved rows for the first time: 500 ms at 9.",
        "| all | 4 | 9 |",
        "| full | 100% / 25% |",
        "| plain | 50 tokens/s (right: 100%) |",
        "| triforce 8 | 1.75x / 2.50 / 50% |",
        "| ngram | tokens differ / 2.50 / 50% |",
    ):
        assert line in shown


def test_the_sentence_is_among_the_documents_and_the_table_says_what_came_of_it(tmp_path: Path) -> None:
    class Words:
        chat_template = "any"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [7, 8]

        def apply_chat_template(self, messages: Any, return_dict: bool = False, **options: Any) -> Any:
            return {"input_ids": [5] * 3} if return_dict else [6] * 30

    ids = long_documents.asked(Words(), 105, "What?")
    assert ids == [6] * 40 + [7, 8] + [6] * 60 + [5] * 3
    row = {"answers": 2, "tokens_per_step": 2.5, "accepted": 0.5, "speedup": 1.25}
    rows = [row | {"method": "plain", "equal": True}, row | {"method": "auto", "equal": False}]
    of = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
    report = {
        "machine": of | {"torch": "1", "transformers": "2"},
        "context": 105,
        "told": False,
        "long_documents": rows,
    }
    (tmp_path / "some.json").write_text(json.dumps(report))
    shown = long.long_documents(tmp_path)
    assert "behind 105 tokens" in shown
    assert "was not found" in shown
    assert shown.splitlines()[-2:] == ["| plain | 1.25x / 2.50 / 50% |", "| auto | tokens differ / 2.50 / 50% |"]
