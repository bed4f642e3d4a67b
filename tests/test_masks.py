"""Who may attend to whom in a tree pass, against the definition spelt out cell by cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specdec.core import DraftTree
from specdec.masks import Layout, Reach, additive, tree_mask


def tree(parents: list[int]) -> DraftTree:
    n = len(parents)
    return DraftTree(np.arange(40, 40 + n), np.array(parents), np.ones(n, np.float32), ("",) * n)


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node, its parent, and so on up to the root."""
    path = [node]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return path


def sees(parents: list[int], node: int, slot: int, length: int, padding: int, reach: Reach) -> bool:
    """Whether a node behind ``length`` committed tokens, the first ``padding`` of them padding, sees a slot."""
    own = length + len(ancestors(parents, node)) - 1
    if slot >= length and slot - length not in ancestors(parents, node):
        return False
    index = slot if slot < length else length + len(ancestors(parents, slot - length)) - 1
    if reach.window is not None and own - index >= reach.window:
        return False
    if reach.chunk is not None and (own - padding) // reach.chunk != (index - padding) // reach.chunk:
        return False
    return index >= padding


@st.composite
def passes(draw: st.DrawFn) -> dict[str, Any]:
    """Trees and lengths of a batch, what of the prompt is padding, how far a layer looks, and what slid out."""
    rows = draw(st.integers(1, 3))
    shapes = [[-1] + [draw(st.integers(0, i - 1)) for i in range(1, draw(st.integers(1, 9)))] for _ in range(rows)]
    columns = draw(st.integers(1, 12))  # of the prompt
    lengths = [columns + draw(st.integers(0, 14)) for _ in range(rows)]
    padding = [draw(st.integers(0, columns - 1)) for _ in range(rows)] if draw(st.booleans()) else None
    reach = draw(st.sampled_from([Reach(), Reach(window=1), Reach(window=5), Reach(chunk=4)]))
    out = min(lengths) - reach.window + 1 if reach.window else 0
    return {
        "shapes": shapes,
        "lengths": lengths,
        "columns": columns,
        "padding": padding,
        "reach": reach,
        "offset": draw(st.integers(0, max(0, out))),
        "filler": draw(st.integers(0, 3)),
    }


@given(passes())
@example({
    "shapes": [[-1, 0]], "lengths": [20], "columns": 4, "padding": [2], "reach": Reach(window=3), "offset": 15,
    "filler": 0,
})  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_every_cell(case: dict[str, Any]) -> None:
    shapes, lengths, offset = case["shapes"], case["lengths"], case["offset"]
    width = max(map(len, shapes)) + case["filler"]
    columns = max(lengths) - offset + width
    padding = case["padding"] or [0] * len(shapes)
    visible = None
    if case["padding"] is not None:
        visible = torch.arange(case["columns"])[None] >= torch.tensor(padding)[:, None]
    layout = Layout.of([tree(shape) for shape in shapes], width)
    mask = tree_mask(layout, lengths, case["reach"], columns, offset, visible)
    assert mask.shape == (len(shapes), 1, width, columns)
    assert mask.dtype == torch.bool
    for row, shape in enumerate(shapes):
        wanted = [
            [
                sees(shape, node, slot, lengths[row], padding[row], case["reach"])
                if slot - lengths[row] < len(shape)
                else False
                for slot in range(offset, offset + columns)
            ]
            for node in range(len(shape))
        ]
        assert mask[row, 0, : len(shape)].tolist() == wanted
    assert mask.any(-1).all()  # a row of nothing would be no number


def test_trees_side_by_side() -> None:
    layout = Layout.of([tree([-1, 0, 0, 2]), tree([-1])], 5)
    assert layout.tokens.tolist() == [[40, 41, 42, 43, 0], [40, 0, 0, 0, 0]]
    assert layout.depth.tolist() == [[0, 1, 1, 2, 0], [0] * 5]
    assert layout.ancestors[0].nonzero().tolist() == [
        [0, 0], [1, 0], [1, 1], [2, 0], [2, 2], [3, 0], [3, 2], [3, 3], [4, 4],
    ]  # fmt: skip
    assert torch.equal(layout.ancestors[1], torch.eye(5, dtype=torch.bool))


def test_a_tree_wider_than_the_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        Layout.of([tree([-1, 0, 0])], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_eager_attention_takes_it(dtype: torch.dtype) -> None:
    added = additive(torch.tensor([True, False]), dtype)
    assert added.dtype == dtype
    assert added.tolist() == [0, torch.finfo(dtype).min]
