"""Drawings by matplotlib, coloured by the page's style sheet, so that one serves light and dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 255  # points; the page shows a point as about 1.35 pixels, on a phone as on a desk
# Stand-ins that matplotlib can draw with, and the style sheet's colours that take their place.
INK, MUTED, RULE, SURFACE, ACCENT, BAD = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
SERIES = tuple(f"#0a0a0{i}" for i in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", SURFACE: "surface", ACCENT: "accent", BAD: "bad"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES, 1)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specdec",
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Plot(NamedTuple):
    """One drawing: its heading, the SVG, and what it shows in words."""

    title: str
    svg: Markup
    words: str


def draw(title: str, words: str, height: float, paint: Callable[[Axes], None]) -> Plot:
    """A plot of ``height`` points; ``words`` say the same to who cannot see it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's plots need matplotlib: pip install 'specdec-runtime[report]'") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, embed(file.getvalue(), title, words), words)


def embed(svg: str, title: str, words: str) -> Markup:
    """A drawing of matplotlib's made part of a page: the page's colours and fonts, ids of its own, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    shape = svg[svg.index("viewBox") :].split('"')[1]
    svg = f'<svg viewBox="{shape}" role="img" aria-label="{escape(words)}">{svg[svg.index(">") + 1 :]}'
    svg = re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub("|".join(VARIABLES), lambda match: f"var(--{VARIABLES[match[0]]})", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    own = f"{re.sub('[^a-z0-9]+', '-', title.lower())}-{zlib.crc32(words.encode())}"
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{own}-{match[1]}"' if match[1] in used else "", svg)
    return Markup(re.sub(r'(url\(|href=")#', rf"\1#{own}-", svg))
