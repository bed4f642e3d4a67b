"""Intervals that cover, loops that are found, differences and what the target makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specdec.bench.difference import Difference, first_difference, logit_margin
from specdec.bench.interval import bootstrap, errors, interval, noise
from specdec.bench.loops import loops
from tests import tiny


@pytest.mark.parametrize(
    ("a", "b", "at"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([], [], None)]
)
def test_first_difference(a, b, at):
    assert first_difference(a, b) == at


def test_the_margin_is_the_targets():
    model, ids = tiny.model(), [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    margin, tie = logit_margin(model, ids, 3, 9)
    assert margin == pytest.approx(float(logits[3] - logits[9]), rel=1e-4)
    assert not tie
    assert logit_margin(model, ids, None, 2) == (None, False)
    text = str(Difference("a", "code", 4, 2, 3, 9, margin))
    assert text.startswith("a on code (prompt 4): token 2 is 9, plain generate has 3, logit margin")


def test_ties_are_of_low_precision_alone():
    model, ids = tiny.model(), [5, 6, 7]
    with torch.no_grad():
        # Token 9 is what token 3 is, but for a hundredth: in bfloat16 passes of two shapes may disagree on them.
        model.lm_head.weight[9] = model.lm_head.weight[3] * 1.01
    for dtype, tie in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)):
        assert logit_margin(model.to(dtype), ids, 3, 9)[1] == tie
    best, worst = (int(pick(model(torch.tensor([ids])).logits[0, -1])) for pick in (torch.argmax, torch.argmin))
    assert not logit_margin(model, ids, best, worst)[1]
    assert "a tie in low precision" in str(Difference("a", "code", 4, 2, 3, 9, 0.1, True))


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(1)
    assert bootstrap([2.0, 2.0]) == (2.0, 2.0)
    values = rng.normal(size=30) + 5
    few = [bootstrap(values, seed=seed, resamples=50) for seed in (3, 3, 4)]
    assert few[0] == few[1] != few[2]
    assert all(map(math.isnan, bootstrap([]) + bootstrap([2.0])))
    intervals = [bootstrap(rng.normal(1.5, 0.3, 40), resamples=400) for _ in range(200)]
    covered = np.mean([low <= 1.5 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99
    assert np.mean([high - low for low, high in intervals]) < 0.35


def prompts(rng, count, repeats, error, spread=0.0):
    """Speedups of a method that is twice as quick, by prompts that differ and repeats that err."""
    ratios = 2 * rng.lognormal(0, spread, (count, 1))
    return (ratios * rng.lognormal(0, error, (count, repeats))).tolist()


def test_intervals_of_few_prompts_cover_as_well_when_repeated():
    rng = np.random.default_rng(2)
    found = [interval(prompts(rng, 12, 3, 0.05, 0.2), resamples=400) for _ in range(150)]
    assert np.mean([low <= 2 <= high for low, high in found]) >= 0.88
    low, high = interval(prompts(rng, 1, 5, 0.05))
    assert 0.8 < low / 2 < high / 2 < 1.25
    assert all(map(math.isnan, interval(prompts(rng, 1, 1, 0.05))))
    assert all(map(math.isnan, interval([])))


@pytest.mark.parametrize("repeats", [2, 8])
def test_noise_is_what_measuring_again_would_change(repeats):
    rng = np.random.default_rng(4)
    measured = [prompts(rng, 8, repeats, 0.1) for _ in range(40)]
    said = np.mean([noise(each, errors(each)) for each in measured])
    again = np.median(np.median(rng.lognormal(0, 0.1, (2000, 8, repeats)), axis=2), axis=1)
    assert said == pytest.approx(np.subtract(*np.quantile(again, [0.975, 0.025])), rel=0.15)


def test_noise_shrinks_with_repeats_and_not_with_likeness_of_prompts():
    rng = np.random.default_rng(5)
    few, many = (
        np.mean([noise(each, errors(each)) for each in runs])
        for runs in ([prompts(rng, 8, n, 0.1, 0.5) for _ in range(20)] for n in (2, 8))
    )
    assert 0.4 < many / few < 0.7
    alike = np.mean([noise(each, errors(each)) for each in [prompts(rng, 8, 8, 0.1) for _ in range(20)]])
    assert many < 3 * alike  # though prompts differ by 50%
    once = prompts(rng, 8, 1, 0.1)
    assert noise(once, errors(once)) == math.inf
    assert noise([*once, [2.0, 2.1]], errors([*once, [2.0, 2.1]])) < math.inf


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 40, True),
        ([1, 2, 3] * 30, True),
        (list(range(100)) + [5, 6, 7, 8, 9] * 6, True),  # it begins late
        (list(range(100)) + [5, 6, 7, 8, 9] * 3, False),  # three times is no loop yet: 15 tokens
        ([9, 9, 9, 9], False),
        ([], False),
        (list(range(64)), False),
        ([token for n in range(30) for token in (1, 2, 3, 4, 5, 6, 7, 100 + n)], False),  # half of its 4-grams are new
        ([token for n in range(30) for token in (*range(14), 100 + n)], True),  # "item 1 is ..., item 2 is ..."
        (list(range(20)) * 3 + list(range(50, 80)), False),  # it came out of it
    ],
)
def test_loops(tokens, expected):
    assert loops(tokens) == expected


def test_texts_are_no_loops():
    rng = np.random.default_rng(5)
    zipf = [int(t) for t in np.minimum(rng.zipf(1.3, 4000), 500)]
    assert not any(loops(zipf[i : i + 128]) for i in range(0, 3800, 128))
