"""Trees to look at, as text and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from unicodedata import east_asian_width

import numpy as np
from jaxtyping import Float, Int

Label = Callable[[int], str]
Nodes = Sequence[int] | np.ndarray

_ROW, _GAP, _LETTER, _MARGIN = 30.0, 34.0, 7.9, 9.0

_STYLE = """
.draft-tree text { font: 13px ui-monospace, monospace; fill: #1f2328; white-space: pre; }
.draft-tree .probability { font-size: 11px; fill: #59636e; }
.draft-tree rect { fill: #f6f8fa; stroke: #8c959f; }
.draft-tree path { fill: none; stroke: #8c959f; }
.draft-tree .accepted rect { fill: #d7f5de; stroke: #1a7f37; stroke-width: 2; }
.draft-tree path.accepted { stroke: #1a7f37; stroke-width: 2.5; }
@media (prefers-color-scheme: dark) {
  .draft-tree text { fill: #f0f6fc; }
  .draft-tree .probability { fill: #9198a1; }
  .draft-tree rect { fill: #212830; stroke: #656c76; }
  .draft-tree path { stroke: #656c76; }
  .draft-tree .accepted rect { fill: #12361f; stroke: #3fb950; }
  .draft-tree path.accepted { stroke: #3fb950; }
}
"""


def draw_text(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float[np.ndarray, " nodes"] | None = None,
    label: Label = str,
    accepted: Nodes = (),
) -> str:
    """The tree as lines of text, one per node, a tick at those in ``accepted``.

    Args:
        tokens: of each node.
        parents: of each node, parents first.
        probability: written after the label where given.
        label: what to write for a token; characters that do not print are written as escapes.
        accepted: node indices.
    """
    notes = _notes(tokens, probability)
    children, ticked, lines = _children(parents), set(accepted), list[str]()
    stack = [(0, "", "")]
    while stack:
        node, indent, branch = stack.pop()
        tick = " ✓" if node in ticked else ""
        lines.append(f"{indent}{branch}{_printable(label(int(tokens[node])))}{notes[node]}{tick}")
        indent += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        stack += [(child, indent, "└─ " if not i else "├─ ") for i, child in enumerate(reversed(children[node]))]
    return "\n".join(lines)


def draw_svg(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float[np.ndarray, " nodes"] | None = None,
    label: Label = str,
    accepted: Nodes = (),
) -> str:
    """The tree as an SVG document that needs nothing else, the root at the left and ``accepted`` in green.

    It has no background and follows the reader's light or dark scheme. Arguments as for ``draw_text``.
    """
    labels = [_printable(label(int(token))) for token in tokens]
    notes, marked = _notes(tokens, probability), set(accepted)
    widths = [2 * _MARGIN + _LETTER * _columns(text + note) for text, note in zip(labels, notes, strict=True)]
    x, y = _places(parents, widths)
    parts = []
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            parts.append(_edge(x[parent] + widths[parent], y[parent], x[node], y[node], node in marked))
    for node, text in enumerate(labels):
        parts.append(_box(x[node], y[node], widths[node], text, notes[node], node in marked))
    right = max(left + width for left, width in zip(x, widths, strict=True))
    return _document(right + _MARGIN, max(y) + 0.7 * _ROW, parts)


def _document(width: float, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="draft-tree" role="img" aria-label="draft tree" {size}>'
    return "\n".join([opening, f"<style>{_STYLE}</style>", *parts, "</svg>"])


def _edge(x: float, y: float, to_x: float, to_y: float, accepted: bool) -> str:
    middle = to_x - _GAP / 2
    curve = f"M{x:.1f} {y:.1f}H{to_x - _GAP:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
    return f'<path{_mark(accepted)} d="{curve}"/>'


def _box(x: float, y: float, width: float, text: str, note: str, accepted: bool) -> str:
    box = f'<rect x="{x:.1f}" y="{y - 11:.1f}" width="{width:.1f}" height="22" rx="5"/>'
    words = f'{escape(text)}<tspan class="probability">{note}</tspan>'
    place = f'x="{x + _MARGIN:.1f}" y="{y + 4.5:.1f}" xml:space="preserve"'
    return f"<g{_mark(accepted)}>{box}<text {place}>{words}</text></g>"


def _children(parents: np.ndarray) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            children[parent].append(node)
    return children


def _places(parents: np.ndarray, widths: list[float]) -> tuple[list[float], list[float]]:
    """Left edge and middle height of each node: a column per depth, a row per leaf, parents amid their children."""
    children, n = _children(parents), len(parents)
    depth, x, y = [0] * n, [0.0] * n, [0.0] * n
    stack, leaves = [0], 0
    while stack:
        node = stack.pop()
        stack += reversed(children[node])
        if not children[node]:
            y[node] = _ROW * (leaves + 0.7)
            leaves += 1
    columns = [0.0] * n
    for node, parent in enumerate(parents.tolist()):
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
        columns[depth[node]] = max(columns[depth[node]], widths[node])
    for node in reversed(range(n)):
        x[node] = _MARGIN + sum(columns[: depth[node]]) + _GAP * depth[node]
        if children[node]:
            y[node] = (y[children[node][0]] + y[children[node][-1]]) / 2
    return x, y


def _notes(tokens: np.ndarray, probability: np.ndarray | None) -> list[str]:
    return [""] * len(tokens) if probability is None else [f" {value:.2f}" for value in probability.tolist()]


def _mark(accepted: bool) -> str:
    return ' class="accepted"' if accepted else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _columns(text: str) -> int:
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
