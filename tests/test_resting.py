"""What a step costs in which nothing is guessed: no more choices, rules and copies than plain ``generate`` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from specdec.cache import SlotCache
from specdec.core import Budget, Context, DraftTree
from specdec.masks import Layout
from specdec.sampling import Noise, Sampler, greatest
from tests import tiny
from tests.tiny import both, padded, prompt

NEW = 12
SAMPLED = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": NEW}


class Silent:
    """Guesses nothing."""

    name, topk, hidden = "silent", 0, False

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        return [DraftTree.root(int(context.tokens[-1])) for context in contexts]


def calls(patch: pytest.MonkeyPatch, of: Any, name: str) -> list[int]:
    """A list that grows by the rows of its second argument whenever a method is called."""
    right, seen = getattr(of, name), list[int]()

    def counted(self: Any, first: Any, *others: Any) -> Any:
        seen.append(len(first))
        return right(self, first, *others)

    patch.setattr(of, name, counted)
    return seen


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


def test_rows_in_step_are_chosen_for_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, TemperatureLogitsWarper, "__call__")
    batch = {**padded(9, 5, 7), **SAMPLED, "eos_token_id": None}
    result = both(model, batch, drafter=Silent(), seed=0)
    assert result.ours.tolist() == result.plain.tolist()
    assert seen == [3] * NEW * 2


def test_rows_that_have_ended_are_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {**padded(9, 5, 7), **SAMPLED}
    torch.manual_seed(0)
    written = model.generate(**batch, eos_token_id=None)[:, 9:]
    ends = int(written[1, 3])  # which ends the second row before the others, or all would be over at once
    seen = calls(monkeypatch, TemperatureLogitsWarper, "__call__")
    result = both(model, {**batch, "eos_token_id": ends, "pad_token_id": 0}, drafter=Silent(), seed=0)
    assert result.ours.tolist() == result.plain.tolist()
    assert {2, 3} <= set(seen)


def sampler(rows: int = 3, **config: Any) -> Sampler:
    rules = StoppingCriteriaList([MaxLengthCriteria(max_length=40), EosTokenCriteria(eos_token_id=2)])
    settings = GenerationConfig(do_sample=True, **config)
    settings._pad_token_tensor = torch.tensor(0)
    return Sampler(prompt(4, rows), LogitsProcessorList([TemperatureLogitsWarper(2.0)]), rules, settings)


def test_who_goes_together() -> None:
    rows = sampler()
    assert rows.abreast() == [[0, 1, 2]]
    rows.commit([0], torch.tensor([5]))
    assert rows.abreast() == rows.groups == [[0], [1], [2]]
    rows.commit([1, 2], torch.tensor([7, 2]))  # the third ends
    assert rows.abreast() == [[0, 1], [2]]
    rows.commit([0, 1], torch.tensor([8, 9]))
    assert rows.committed([0, 1])[:, 4:].tolist() == [[5, 8], [7, 9]]
    assert rows.committed([2])[:, 4:].tolist() == [[2]]


def test_rows_draw_alike_alone_and_together() -> None:
    laws = torch.softmax(torch.randn(6, 3, 50, generator=torch.Generator().manual_seed(1)), -1)
    torch.manual_seed(0)
    wanted = [torch.multinomial(law, 1)[:, 0].tolist() for law in laws]
    torch.manual_seed(0)
    noise, got = Noise(3), [[-1] * 3 for _ in laws]
    for rows, step in [([0], 0), ([0], 1), ([1, 2], 0), ([2], 1), ([1], 1), *(([0, 1, 2], s) for s in (2, 3, 4, 5))]:
        for row, token in zip(rows, noise.draw(laws[step, rows], rows, step).tolist(), strict=True):
            got[step][row] = token
    assert got == wanted


def test_steps_that_nobody_draws_for_take_no_noise() -> None:
    laws = torch.full((1, 50), 0.02)
    torch.manual_seed(0)
    wanted = [torch.multinomial(laws, 1).item() for _ in range(2)]
    torch.manual_seed(0)
    noise = Noise(1)
    got = [noise.draw(laws.clone(), [0], 0).item()]
    noise.forget(7)  # six tokens came from a rule of rejection
    assert [*got, noise.draw(laws.clone(), [0], 7).item()] == wanted


def test_the_greatest_is_argmax() -> None:
    scores = torch.randn(4, 300)
    scores[1, [7, 200]], scores[2, 40], scores[3] = 9.0, torch.nan, -torch.inf
    assert torch.equal(greatest(scores), scores.argmax(-1))


@pytest.mark.parametrize(("layers", "moved"), [({}, 0), ({"sliding_window": 4}, NEW - 1)], ids=["full", "window"])
def test_rows_are_kept_by_doing_nothing(layers: dict[str, Any], moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("Mistral", **{"sliding_window": None, **layers})
    monkeypatch.setattr("specdec.attach.costs_of", lambda model: (None, ""))  # of as many passes as there is time for
    seen = calls(monkeypatch, SlotCache, "keep")
    arguments = {"input_ids": prompt(), "max_new_tokens": NEW, "eos_token_id": None}
    result = both(model, arguments, drafter=Silent())
    assert result.ours.tolist() == result.plain.tolist()
    assert len(seen) - attached(model, seen) == moved


def attached(model: Any, seen: list[int]) -> int:
    """How often rows are kept by the self-test alone."""
    from specdec.attach import attach

    before = len(seen)
    attach(model)
    return len(seen) - before


def test_a_layout_of_roots_is_as_any_other() -> None:
    roots = [DraftTree.root(5), DraftTree.root(8)]
    one, two = Layout.of(roots, 1), Layout.of(roots, 2)
    for name in ("tokens", "depth"):
        assert torch.equal(getattr(one, name), getattr(two, name)[:, :1])
    assert torch.equal(one.ancestors, two.ancestors[:, :1, :1])
    assert one.tokens.dtype == two.tokens.dtype
    with pytest.raises(ValueError, match="broadcast"):
        Layout.of([DraftTree.chain(5, [6], [1.0], "")], 1)
