"""Drawings show every node, and labels stay labels."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import trees

TOKENS, PARENTS = np.array([5, 8, 9, 3, 4]), np.array([-1, 0, 0, 1, 1])
PROBABILITY = np.array([1, 0.62, 0.25, 0.5, 0.06], np.float32)
SVG = "{http://www.w3.org/2000/svg}"


def test_text_is_a_tree_of_lines():
    wanted = "5 1.00 ✓\n├─ 8 0.62 ✓\n│  ├─ 3 0.50\n│  └─ 4 0.06\n└─ 9 0.25"
    assert trees.draw_text(TOKENS, PARENTS, PROBABILITY, accepted=[0, 1]) == wanted
    assert trees.draw_text(TOKENS[:1], PARENTS[:1]) == "5"


def test_text_writes_control_characters_as_escapes():
    text = trees.draw_text(TOKENS, PARENTS, label={5: "a\nb", 8: "\x1b[2J", 9: "é", 3: "\u202e", 4: "日"}.__getitem__)
    assert text.splitlines() == ["a\\nb", "├─ \\x1b[2J", "│  ├─ \\u202e", "│  └─ 日", "└─ é"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=12), min_size=5, max_size=5))
def test_svg_is_sound_whatever_the_labels(labels):
    svg = trees.draw_svg(TOKENS, PARENTS, PROBABILITY, dict(zip(TOKENS.tolist(), labels, strict=True)).__getitem__)
    drawing = ElementTree.fromstring(svg)
    shown = [text.text or "" for text in drawing.iter(f"{SVG}text")]
    assert shown == [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in label) for label in labels
    ]


def test_svg_marks_the_accepted_path_and_escapes():
    svg = trees.draw_svg(TOKENS, PARENTS, PROBABILITY, lambda token: f"<b>{token}&", accepted=np.array([0, 1, 4]))
    assert "<b>" not in svg
    drawing = ElementTree.fromstring(svg)
    marked = [group.find(f"{SVG}text").text for group in drawing.iter(f"{SVG}g") if group.get("class") == "accepted"]
    assert marked == ["<b>5&", "<b>8&", "<b>4&"]
    assert [path.get("class") for path in drawing.iter(f"{SVG}path")] == ["accepted", None, None, "accepted"]
    assert "prefers-color-scheme: dark" in svg
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_svg_boxes_do_not_overlap():
    drawing = ElementTree.fromstring(trees.draw_svg(TOKENS, PARENTS, label=lambda token: "wide " * token))
    boxes = [[float(rect.get(key)) for key in ("x", "y", "width", "height")] for rect in drawing.iter(f"{SVG}rect")]
    _, _, right, bottom = map(float, drawing.get("viewBox").split())
    for i, (x, y, width, height) in enumerate(boxes):
        assert x >= 0
        assert y >= 0
        assert x + width <= right
        assert y + height <= bottom
        for u, v, w, h in boxes[:i]:
            assert x >= u + w or u >= x + width or y >= v + h or v >= y + height


def test_a_long_chain_can_be_drawn():
    tokens, parents = np.arange(1500), np.arange(-1, 1499)
    assert trees.draw_text(tokens, parents).count("\n") == 1499
    assert trees.draw_svg(tokens, parents).count("<rect") == 1500


@pytest.mark.parametrize("probability", [None, PROBABILITY])
def test_graph_has_every_node_and_edge(probability):
    graph = trees.to_networkx(TOKENS, PARENTS, probability)
    assert [graph.nodes[node]["token"] for node in range(5)] == TOKENS.tolist()
    assert set(graph.edges) == {(0, 1), (0, 2), (1, 3), (1, 4)}
    assert [graph.nodes[node].get("probability") for node in range(5)] == (
        [None] * 5 if probability is None else PROBABILITY.tolist()
    )
