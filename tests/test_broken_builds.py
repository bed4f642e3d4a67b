"""Builds that are broken on purpose: a grid that stays green on one of them would test nothing.

Three of them break the tree pass. The self-test at attach sees these and goes down to chains, which they do not touch,
so the output stays right; forced to run trees all the same, they give wrong output, and the grid sees that too. The
rest break what comes before or after the pass, which only the grid can see.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec import masks, trees
from specdec.attach import Attachment, attach
from specdec.cache import SlotCache
from specdec.model import Model
from specdec.sampling import Noise, Sampler
from specdec.verifiers import PathwiseVerifier

from . import grid

# Each breaks one thing, and says which.


def every_node_sees_every_other(patch):
    right = trees.lay_out

    def broken(parents, depth, ancestors):
        right(parents, depth, ancestors)
        ancestors[: len(parents), : len(parents)] = True

    patch.setattr(trees, "lay_out", broken)


def positions_by_index(patch):
    right = Model._positions
    patch.setattr(Model, "_positions", lambda model, layout, *others: right(model, _by_index(layout), *others))


def rows_kept_by_count(patch):
    patch.setattr("specdec.cache._displaced", lambda path: False)


def walk_takes_a_child_without_looking_at_its_token(patch):
    def child(tokens, parents, node, token):
        return next((i for i, parent in enumerate(parents) if parent == node), -1)

    def greedy_path(tokens, parents, choices):
        path = [0]
        while (node := child(tokens, parents, path[-1], None)) >= 0:
            path.append(node)
        return np.array(path)

    patch.setattr(trees, "child", child)
    patch.setattr(trees, "greedy_path", greedy_path)


def choice_favours_what_was_guessed(patch):
    def biased(walk):
        def walked(verifier, group, batch, logits, candidates):
            for row, tree in enumerate(batch):
                logits[row][:, tree.tokens[1:]] += 3.0
            return walk(verifier, group, batch, logits, [None] * len(batch))

        return walked

    for name in ("_walk", "_walk_quick"):
        patch.setattr(PathwiseVerifier, name, biased(getattr(PathwiseVerifier, name)))


def rows_draw_in_their_own_order(patch):
    patch.setattr(Noise, "draw", lambda noise, probabilities, *others: torch.multinomial(probabilities, 1)[:, 0])
    patch.setattr(Noise, "agrees", lambda device: True)


def stopping_rules_are_asked_at_the_end_of_a_path_only(patch):
    over, walk = Sampler.over, PathwiseVerifier._walk

    def walked(verifier, group, *others):
        if over(verifier.sampler, group):
            return walk(verifier, group, *others)
        with patch.context() as inside:
            inside.setattr(Sampler, "over", lambda sampler, group: False)
            return walk(verifier, group, *others)

    patch.setattr(PathwiseVerifier, "_walk", walked)
    patch.setattr(Sampler, "quick", False)


def processors_see_the_text_before_the_path(patch):
    choose, walk = Sampler.choose, PathwiseVerifier._walk

    def walked(verifier, group, *others):
        group_length = verifier.sampler.length(group)

        def stale(sampler, group, logits):
            processors = sampler.processors
            sampler.processors = lambda ids, scores: processors(ids[:, :group_length], scores)
            try:
                return choose(sampler, group, logits)
            finally:
                sampler.processors = processors

        with patch.context() as inside:
            inside.setattr(Sampler, "choose", stale)
            return walk(verifier, group, *others)

    patch.setattr(PathwiseVerifier, "_walk", walked)


def windows_count_slots(patch):
    right = masks.tree_mask
    patch.setattr("specdec.model.tree_mask", lambda layout, *others: right(_by_index(layout), *others))


def padding_is_seen(patch):
    right = masks.tree_mask
    patch.setattr("specdec.model.tree_mask", lambda *parts: right(*parts[:-1], None))


def _by_index(layout: masks.Layout) -> masks.Layout:
    return dataclasses.replace(layout, depth=torch.arange(layout.depth.shape[1]).expand_as(layout.depth))


def rejected_rows_stay(patch):
    patch.setattr(SlotCache, "keep", lambda slots, base, paths: None)


ONE, THREE, SAMPLED, EAGER = (
    ("full", "sdpa", 1, False), ("mixed", "sdpa", 3, False), ("full", "sdpa", 3, True), ("sliding", "eager", 1, True)
)  # fmt: skip
CELLS = (ONE, THREE, SAMPLED, EAGER)
PASS = (every_node_sees_every_other, positions_by_index, rows_kept_by_count)
WALK = (
    walk_takes_a_child_without_looking_at_its_token, choice_favours_what_was_guessed,
    processors_see_the_text_before_the_path,
)  # fmt: skip
BROKEN = [
    *((broken, cell) for broken in PASS + WALK for cell in CELLS),
    *((stopping_rules_are_asked_at_the_end_of_a_path_only, cell) for cell in (ONE, THREE)),
    (rows_draw_in_their_own_order, SAMPLED),
    (windows_count_slots, THREE),
    (windows_count_slots, EAGER),
    (padding_is_seen, THREE),
    (padding_is_seen, SAMPLED),
]


SLICE = (
    ("none", "max_new_tokens"), ("no_repeat_ngram", "eos_list"),
    ("repetition_penalty", "eos"), ("several", "custom_and_eos"),
)  # fmt: skip


@cache
def plain(cell: grid.Cell) -> tuple[Any, Attachment, list[grid.Reference]]:
    """A small slice of the grid: one cell's model, what its self-test finds, and what plain ``generate`` says."""
    layers, attention, rows, sample = cell
    model, choice = grid.tiny(layers, attention), "temperature" if sample else None
    asked = [grid.Asked(*names, choice, rows, seed, new=32) for seed, names in enumerate(SLICE * 2)]
    return model, attach(model), [grid.Reference.of(model, each) for each in asked]


def wrong(cell: grid.Cell) -> list[str]:
    """What the grid says of the build as it now is."""
    model, _, references = plain(cell)
    twin = grid.wrapped(model, grid.DRAFTERS["oracle"]())
    return [each for reference in references for each in grid.differences(twin, reference, "cache")]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else "-".join(map(str, value))


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_the_slice_is_green_on_the_right_build(cell):
    assert plain(cell)[1].form.level == "tree"
    assert wrong(cell) == []


@pytest.mark.parametrize(("broken", "cell"), BROKEN, ids=name)
def test_the_grid_is_red_on_a_broken_build_that_runs_trees(broken, cell, monkeypatch):
    _, attachment, _ = plain(cell)
    monkeypatch.setattr("specdec.speculate.attach", lambda module: attachment)
    broken(monkeypatch)
    assert wrong(cell)


@pytest.mark.parametrize("cell", CELLS, ids=name)
@pytest.mark.parametrize("broken", PASS, ids=name)
def test_the_self_test_takes_a_broken_tree_pass_down_to_chains_which_are_right(broken, cell, monkeypatch):
    model, *_ = plain(cell)
    broken(monkeypatch)
    form = attach(model).form
    assert form.level == "chain"
    assert "logits differ" in form.reason
    with pytest.warns(specdec.SpecdecWarning, match="chains only"):
        assert wrong(cell) == []


def test_the_self_test_takes_a_cache_that_cannot_forget_down_to_plain_generate(monkeypatch):
    model, _, (reference, *_) = plain(ONE)
    rejected_rows_stay(monkeypatch)
    assert attach(model).form.level == "plain"
    with pytest.raises(ValueError, match="takes no drafts"):
        wrong(ONE)
    with specdec.speculating(model), pytest.warns(specdec.SpecdecWarning, match="plain generate"):
        assert torch.equal(
            model.generate(**reference.prompts, **reference.asked.arguments("tokens")), reference.output.sequences
        )
