"""Speculative output is plain ``generate``'s: tokens, scores, logits, cache and random state, in every combination."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch

import specdec

from . import grid


@cache
def model(layers: str, attention: str) -> Any:
    return grid.tiny(layers, attention)


@cache
def twin(layers: str, attention: str, drafter: str) -> Any:
    """One per drafter, so that those that learn have learnt from the cases before."""
    return grid.wrapped(model(layers, attention), grid.DRAFTERS[drafter]())


def test_the_grid_has_enough_cases_and_every_pair_of_options():
    """The rest of this file runs exactly these."""
    cases = [
        (*cell, asked.processors, asked.stop, asked.choice, drafter, form)
        for cell in grid.cells()
        for number, asked in enumerate(grid.asked(cell))
        for drafter, form in grid.runs(cell, number)
    ]
    assert len(cases) >= 2000
    for one, other in itertools.combinations(range(9), 2):
        had = {(case[one], case[other]) for case in cases}
        options = itertools.product({case[one] for case in cases}, {case[other] for case in cases})
        never = [pair for pair in options if pair not in had]
        assert (one, other) == (3, 6) or not never, never  # greedy or sampled, and how: one goes with the other


@pytest.mark.parametrize("cell", grid.cells(), ids=lambda cell: "-".join(map(str, cell)))
def test_every_way_of_calling_generate_gives_what_plain_generate_gives(cell, monkeypatch):
    layers, attention, rows, _ = cell
    if rows % 2 == 0:
        monkeypatch.setattr("specdec.cache.GROWTH", 8)  # buffers that grow and slide several times in a short text
    twins = {drafter: twin(layers, attention, drafter) for drafter in grid.DRAFTERS}
    for each in twins.values():
        specdec.stats(each).reset()
    differences, early = [], 0
    for number, asked in enumerate(grid.asked(cell)):
        reference = grid.Reference.of(model(layers, attention), asked)
        early += len(reference.output.scores) < grid.NEW
        for drafter, form in grid.runs(cell, number):
            differences += [f"{drafter}: {each}" for each in grid.differences(twins[drafter], reference, form)]
    assert differences == []
    assert early >= 3
    stats = {drafter: specdec.stats(each) for drafter, each in twins.items()}
    for each in stats.values():
        assert (each.level, each.plain_generations, each.fault_count) == ("tree", 0, 0)
        assert each.drafted > 0
    assert stats["oracle"].tokens_per_step > 1.5


@pytest.mark.parametrize("rows", grid.BATCHES)
@pytest.mark.parametrize("layers", grid.LAYERS)
def test_greedy_decoding_without_processors_takes_a_short_way_that_is_as_right(layers, rows):
    for seed, stop in enumerate(("max_new_tokens", "eos", "eos_list")):
        asked = grid.Asked("none", stop, None, rows, seed)
        reference = grid.Reference.of(model(layers, "sdpa"), asked)
        for drafter, form in itertools.product(("oracle", "merged"), ("tokens", "cache")):
            assert grid.differences(twin(layers, "sdpa", drafter), reference, form) == []


@pytest.mark.parametrize("layers", grid.LAYERS)
def test_the_defaults_give_what_plain_generate_gives(layers):
    """The policy goes by the clock, so what is drafted varies from run to run; what comes out must not."""
    twin = specdec.wrap(copy.copy(model(layers, "sdpa")), on_unsupported="error")
    for seed, (rows, choice, stop) in enumerate(itertools.product((1, 3), (None, "top_p"), ("eos_list", "custom"))):
        reference = grid.Reference.of(model(layers, "sdpa"), grid.Asked("none", stop, choice, rows, seed))
        assert grid.differences(twin, reference, "cache") == []


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("layers", grid.LAYERS)
def test_the_shortest_generations_leave_the_right_cache_too(layers, new):
    for rows, choice, form in itertools.product((1, 3), (None, "pure"), ("cache", "all")):
        reference = grid.Reference.of(model(layers, "sdpa"), grid.Asked("none", "eos_list", choice, rows, 3, new))
        assert grid.differences(twin(layers, "sdpa", "oracle"), reference, form) == []


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layers", grid.LAYERS)
def test_long_texts_outgrow_every_buffer_and_stay_equal(layers, rows):
    asked = grid.Asked("repetition_penalty", "max_new_tokens", "top_k", rows, seed=1, new=300)
    reference = grid.Reference.of(model(layers, "sdpa"), asked)
    assert len(reference.output.scores) > 256 + grid.WINDOW
    for form in ("cache", "all"):
        assert grid.differences(twin(layers, "sdpa", "oracle"), reference, form) == []


@pytest.mark.parametrize("layers", grid.LAYERS)
def test_logits_of_float64_models_agree_to_the_last_digits(layers):
    """What differs in float32 is rounding alone: with 29 more bits it is gone."""
    exact = grid.tiny(layers, "sdpa", torch.float64)
    reference = grid.Reference.of(exact, grid.Asked("none", "max_new_tokens", None, 3, seed=2))
    each = grid.wrapped(exact, grid.DRAFTERS["oracle"]())
    each.generate.speculate.drafter.texts = reference.texts
    ours = each.generate(**reference.prompts, **reference.asked.arguments("all"))
    assert grid.error(ours.logits, reference.output.logits) <= 1e-7  # generate itself returns them in float32
    for a, b in zip(ours.past_key_values.layers, reference.output.past_key_values.layers, strict=True):
        assert (a.keys - b.keys).abs().max() < 1e-12
