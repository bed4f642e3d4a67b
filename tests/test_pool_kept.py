"""A pool reads of a prompt what no text has had before it; what it writes is what it would have written anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache

import specdec
from specdec import timing
from specdec.cache import Rows
from specdec.policies import FixedPolicy
from specdec.pool import SessionPool, engine
from specdec.pool.kept import Kept, KeptText, fill
from tests import tiny
from tests.tiny import prompt

LONG = {"max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIMING_SECONDS", 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("Llama").double()  # in which a wrong row cannot hide behind rounding


@contextmanager
def pool(model: Any, **options: Any) -> Iterator[SessionPool]:
    with SessionPool(model, drafter="ngram", policy=FixedPolicy(6, 3, 2), **options) as made:
        yield made


def behind(text: torch.Tensor, *tokens: int) -> torch.Tensor:
    """A text and more."""
    return torch.cat([text, torch.tensor([tokens])], 1)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2"])
def test_turns_go_on_where_the_last_one_ended(kind: str) -> None:
    window = {} if kind == "Llama" else {"sliding_window": 8}
    model, text = tiny.build(kind, **window).double(), prompt(40)
    logits = {"return_dict_in_generate": True, "output_logits": True}
    with pool(model) as ours, ours.session() as session:
        for _ in range(3):
            mine, theirs = (each.generate(text, **LONG, **logits) for each in (session, model))
            assert mine.sequences.tolist() == theirs.sequences.tolist()
            torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-6, rtol=0)
            text = behind(mine.sequences, 5, 6, 7)
        assert [turn.reused_tokens for turn in session.turns] == [0, 47, 58]
        edited = text.clone()
        edited[0, 45] += 1
        assert session.generate(edited, **LONG).tolist() == model.generate(edited, **LONG).tolist()
        assert session.turns[-1].reused_tokens == (45 if kind == "Llama" else 0)  # the window has moved on
        assert ours.stats.reused_tokens == sum(turn.reused_tokens for turn in session.turns)


def test_a_prompt_that_was_read_before_is_read_for_its_last_token_alone(model: Any) -> None:
    with pool(model) as ours, ours.session() as session:
        once, again = (session.generate(prompt(40), **LONG) for _ in range(2))
    assert once.tolist() == again.tolist()
    assert session.turns[-1].reused_tokens == 39


@pytest.mark.parametrize("prompt_tokens", [512, 24])
def test_a_common_beginning_is_read_once(model: Any, prompt_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PROMPT_TOKENS", prompt_tokens)
    texts = [behind(prompt(50), 60 + i, 9, 4 + i) for i in range(4)]
    with pool(model, max_kept_bytes=0) as ours:
        requests = [ours.submit(text, **LONG) for text in texts]
        outputs = [request.result().tolist() for request in requests]
    assert outputs == [model.generate(text, **LONG).tolist() for text in texts]
    assert [request.stats.reused_tokens for request in requests] == [0, 50, 50, 50]


@pytest.mark.parametrize(("unread", "waits"), [(50, True), (51, False)])
def test_nobody_waits_longer_than_reading_takes(unread: int, waits: bool) -> None:
    def row(tokens: torch.Tensor, unread: int) -> Any:
        context = SimpleNamespace(tokens=tokens[0].numpy())
        return SimpleNamespace(reader="some", read=tokens.shape[1] - unread, unread=unread, context=context)

    long, short = row(prompt(200), unread), row(behind(prompt(200)[:, :50], 0), 51)
    assert engine.Engine._waits(SimpleNamespace(joining=[long, short]), short) == waits
    assert not engine.Engine._waits(SimpleNamespace(joining=[long, short]), long)


def test_who_waits_for_a_prompt_that_is_given_up_reads_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 10)
    texts, read = [behind(prompt(50), 60 + i) for i in range(2)], engine.Row.read_prompt

    def given_up_midway(row: Any, most: int) -> int:
        if row.read == 20 and row.request is requests[0]:
            row.request.cancel()
        return read(row, most)

    monkeypatch.setattr(engine.Row, "read_prompt", given_up_midway)
    with pool(model) as ours:
        requests = [ours.submit(text, **LONG) for text in texts]
        assert requests[1].result().tolist() == model.generate(texts[1], **LONG).tolist()
    assert requests[0].cancelled()
    assert requests[1].stats.reused_tokens == 0


def test_another_namespace_has_rows_of_its_own(model: Any) -> None:
    with pool(model) as ours:
        requests = [ours.submit(prompt(40), namespace=name, **LONG) for name in "ab"]  # at once
        assert requests[0].result().tolist() == requests[1].result().tolist()
        requests += [ours.submit(prompt(40), namespace=name, **LONG) for name in "ca"]
        assert requests[3].result().tolist() == requests[2].result().tolist()
    assert [request.stats.reused_tokens for request in requests] == [0, 0, 0, 39]


def test_rows_at_other_positions_are_others(model: Any) -> None:
    later = {"position_ids": torch.arange(7, 47)[None]}
    with pool(model) as ours:
        for arguments, reused in (({}, 0), (later, 0), (later, 0), ({}, 39)):
            request = ours.submit(prompt(40), **LONG, **arguments)
            assert request.result().tolist() == model.generate(prompt(40), **LONG, **arguments).tolist()
            assert request.stats.reused_tokens == reused


def test_weights_that_have_changed(model: Any) -> None:
    model = tiny.build("Llama").double()
    with pool(model) as ours:
        ours.generate(prompt(40), **LONG)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        ours.reset()
        assert ours.kept_bytes == 0
        assert ours.generate(prompt(40), **LONG).tolist() == model.generate(prompt(40), **LONG).tolist()


class Failing(LogitsProcessor):
    """Raises at the third token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 42:
            raise ZeroDivisionError("by none")
        return scores


def test_a_text_that_failed_is_not_kept(model: Any) -> None:
    with pool(model) as ours:
        with pytest.raises(ZeroDivisionError):
            ours.generate(prompt(40), logits_processor=[Failing()], **LONG)
        assert ours.kept_bytes == 0


class TestBytes:
    def test_no_memory_to_keep_a_text_in(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def keep(*_: Any) -> None:
            raise torch.OutOfMemoryError("none left")

        monkeypatch.setattr(Kept, "keep", keep)
        with pool(model) as ours, pytest.warns(specdec.SpecdecWarning, match="given up: none left"):
            assert ours.generate(prompt(40), **LONG).tolist() == model.generate(prompt(40), **LONG).tolist()

    def test_what_is_kept_is_bounded_and_ends_with_the_pool(self, model: Any) -> None:
        with pool(model, max_kept_bytes=60_000) as ours:  # two texts, but not three
            for seed in (0, 1, 0, 2):
                ours.generate(prompt(40, seed=seed), **LONG)
                assert 0 < ours.kept_bytes <= 60_000
            counts = [ours.stats.reused_tokens]
            for seed in (0, 1):
                ours.generate(prompt(40, seed=seed), **LONG)
                counts.append(ours.stats.reused_tokens)
        assert counts == [39, 78, 78]  # the longest unused was dropped
        assert ours.kept_bytes == 0

    def test_it_gives_way_to_requests(self, model: Any) -> None:
        with pool(model, max_cache_bytes=1_000_000) as ours:
            ours.generate(prompt(40), **LONG)
            held, most = ours.kept_bytes, []
            watch = lambda *_: most.append(ours.cache_bytes + ours.kept_bytes)  # noqa: E731
            requests = [ours.submit(prompt(60, seed=seed), max_new_tokens=40) for seed in range(1, 6)]
            for request in requests:
                request.add_done_callback(watch)
                request.result()
            assert held > 0
            assert max(most) <= 1_000_000

    def test_none(self, model: Any) -> None:
        with pool(model, max_kept_bytes=0) as ours:
            ours.generate(prompt(40), **LONG)
            assert ours.kept_bytes == 0
        with pytest.raises(ValueError, match="max_kept_bytes is 0 at least, got -1"):
            SessionPool(model, max_kept_bytes=-1)


def text(*tokens: int, reader: str = "") -> KeptText:
    """A text of one layer, whose rows hold its tokens: 8 bytes each in keys, and in values."""
    rows = torch.tensor(tokens, dtype=torch.float64)[None, None, :, None]
    return KeptText(reader, np.array(tokens), (Rows(0, rows, rows), None))


class TestKept:
    def test_a_text_takes_the_place_of_those_it_goes_on_from(self) -> None:
        kept = Kept(1000)
        for each in (text(1, 2), text(1, 3), text(1, 2, reader="other"), text(1, 2, 5)):
            kept.keep(each, 1000)
        assert [(each.reader, each.tokens.tolist()) for each in kept.texts] == [
            ("", [1, 3]), ("other", [1, 2]), ("", [1, 2, 5])
        ]  # fmt: skip
        assert kept.bytes_used == 16 * 7
        assert kept.longest("", np.array([1, 2, 4]), least=2)[0] == 2
        assert kept.longest("", np.array([1, 2, 4]), least=3) == (0, None)
        assert kept.longest("third", np.array([1, 2, 4]), least=0) == (0, None)

    def test_what_does_not_fit_takes_no_ones_place(self) -> None:
        kept = Kept(16 * 4)
        kept.keep(text(1, 2), 1000)
        kept.keep(text(*range(5)), 1000)
        kept.keep(text(3, 4), 16)
        assert [each.tokens.tolist() for each in kept.texts] == [[1, 2]]

    def test_the_rows_are_copies(self) -> None:
        kept, mine = Kept(1000), text(1, 2)
        kept.keep(mine, 1000)
        mine.layers[0].keys.zero_()
        assert kept.texts[0].layers[0].keys.flatten().tolist() == [1, 2]

    def test_a_cache_of_other_layers_is_left_alone(self) -> None:
        cache = DynamicCache(config=tiny.build("Llama", num_hidden_layers=1).config)
        assert not fill(cache, text(1, 2).layers, 1)
        assert cache.get_seq_length() == 0
