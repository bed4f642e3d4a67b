"""The report's plots, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from specdec.page.drawing import ACCENT, BAD, MUTED, SERIES, SURFACE, Plot, draw
from specdec.page.headline import ALL, Record, interval, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("prefill", "draft", "verify", "walk", "cache", "other")
MARKERS, LINES, HATCHES = "osD^vP", ("-", "--", "-.", ":"), ("", "////", "", "\\\\\\\\", "....", "xxxx")
ROW = 15  # points that a method takes


def speeds(records: Sequence[Record], workload: str, ours: Container[str] = (), mark: str = "") -> Plot:
    """Speedup of each method on one kind of work, with its interval; one scale for all kinds.

    Our methods have round marks; ``mark`` follows each figure.
    """
    rows = [r for r in records if r["workload"] == workload and r["method"] != r["baseline"]]
    ends = [r[key] for r in records for key in ("speedup_low", "speedup_high") if r[key] is not None]
    low, high = min([0.8, *ends]), max([2.0, *ends])

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.1, high * 1.1)
        _ticks(axes, [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if low / 1.1 <= t <= high * 1.1])
        axes.axvline(1, color=MUTED, linewidth=0.8)
        for y, record in enumerate(rows):
            _speed(axes, y, record, record["method"] in ours, mark)
        axes.set_yticks(range(len(rows)), [r["method"] for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)

    title = "All work" if workload == ALL else workload
    words = f"Speed over plain generate, {title}: " + "; ".join(map(_in_words, rows))
    return draw(title, words, 26 + ROW * len(rows), paint)


def _speed(axes: Axes, y: int, record: Record, ours: bool, mark: str) -> None:
    if record["speedup"] is None:
        axes.text(1.04, y, verdict(record), color=MUTED if record["equal"] else BAD, va="center", size=8)
        return
    colour = ACCENT if ours else MUTED
    if record["speedup_low"] is not None:
        axes.plot([record["speedup_low"], record["speedup_high"]], [y, y], color=colour, linewidth=1.6, alpha=0.55)
    axes.plot(record["speedup"], y, "o" if ours else "s", color=colour, markersize=5 if ours else 4)
    axes.text(1.02, y, times(record["speedup"]) + mark, transform=axes.get_yaxis_transform(), va="center", size=8)


def verdict(record: Record) -> str:
    """Why a record has no speed, or that it has one."""
    if not record["equal"]:
        return "✕ failed: tokens differ"
    return "equal, no speed" if record["speedup"] is None else "equal"


def _in_words(record: Record) -> str:
    if record["speedup"] is None:
        return f"{record['method']} {verdict(record).removeprefix('✕ ')}"
    return f"{record['method']} {times(record['speedup'])}, {interval(record)}"


def where_time_goes(parts: Sequence[Record]) -> Plot:
    """Milliseconds per generated token by part, one bar per method."""
    rows = [p for p in parts if p["tokens"]]
    cost = {part: [1e3 * p["seconds"][part] / p["tokens"] for p in rows] for part in PARTS}

    def paint(axes: Axes) -> None:
        left = [0.0] * len(rows)
        for part, colour, hatch in zip(PARTS, SERIES, HATCHES, strict=True):
            style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": SURFACE, "linewidth": 0.8}
            axes.barh(range(len(rows)), cost[part], left=left, height=0.62, label=part, **style)
            left = [start + more for start, more in zip(left, cost[part], strict=True)]
        for y, total in enumerate(left):
            axes.text(total, y, f"  {total:.1f}", va="center", size=8)
        axes.margins(x=0.15)
        axes.set_yticks(range(len(rows)), [p["method"] for p in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("ms per generated token")
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.3, 1), handlelength=1.4, columnspacing=1.2)

    said = [
        f"{p['method']} " + ", ".join(f"{part} {cost[part][i]:.1f} ms" for part in PARTS) for i, p in enumerate(rows)
    ]
    return draw("Time per token", "Milliseconds per generated token. " + "; ".join(said), 70 + 20 * len(rows), paint)


def accepted_lengths(part: Record) -> Plot:
    """How many guesses each step of one method accepted, as shares of its steps."""
    return _shares(part["method"], "Guesses accepted in a step", part["accepted_lengths"], SERIES[0])


def sizes(part: Record) -> Plot:
    """How large the trees of one method were, the root included, as shares of its steps."""
    return _shares(part["method"], "Nodes in a step's tree, the root included", part["sizes"], SERIES[2])


def _shares(title: str, label: str, counts: dict[str, int], colour: str) -> Plot:
    total = max(sum(counts.values()), 1)
    shares = {int(x): 100 * n / total for x, n in sorted(counts.items(), key=lambda item: int(item[0]))}

    def paint(axes: Axes) -> None:
        axes.bar(list(shares), list(shares.values()), width=0.8, color=colour)
        axes.set_xlim(-0.6 if 0 in shares else 0, max([*shares, 8]) + 0.6)
        _ticks(axes, _whole(max([*shares, 8])))
        axes.yaxis.set_major_formatter("{x:.0f}%")
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(label)

    return draw(title, f"{label}: " + ", ".join(f"{x}: {share:.0f}%" for x, share in shares.items()), 105, paint)


def acceptance(parts: Sequence[Record]) -> Plot:
    """Conditional acceptance: how often the next guess of a path so far accepted is accepted; one line per method."""

    def paint(axes: Axes) -> None:
        for i, part in enumerate(parts):
            depths = range(1, 1 + len(part["conditional_acceptance"]))
            axes.plot(
                depths, [100 * share for share in part["conditional_acceptance"]], **_line(i), label=part["method"]
            )
        _ticks(axes, _whole(max((len(p["conditional_acceptance"]) for p in parts), default=1), first=1))
        axes.yaxis.set_major_formatter("{x:.0f}%")
        axes.set_ylim(0, None)
        axes.set_xlabel("depth of the guess")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=2)

    said = [f"{p['method']} " + ", ".join(f"{share:.0%}" for share in p["conditional_acceptance"]) for p in parts]
    words = (
        "Share accepted of the paths that were accepted so far and guessed once more, by depth from 1. "
        + "; ".join(said)
    )
    return draw("Acceptance by depth", words, 140 + 6 * len(parts), paint)


def pass_cost(costs: Sequence[Record]) -> Plot:
    """Milliseconds of one pass over N nodes: T(N)."""
    names = [f"{'kernels' if c['kernels'] else 'plain'}, context {c['context']}" for c in costs]

    def paint(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        for i, (name, cost) in enumerate(zip(names, costs, strict=True)):
            axes.plot(
                [int(n) for n in cost["seconds"]], [1e3 * s for s in cost["seconds"].values()], **_line(i), label=name
            )
        _ticks(axes, sorted({int(n) for cost in costs for n in cost["seconds"]}))
        axes.set_ylim(0, None)
        axes.set_xlabel("nodes N in the pass")
        axes.set_ylabel("ms")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1))

    said = [
        f"{name}: " + ", ".join(f"{n}: {1e3 * s:.0f} ms" for n, s in cost["seconds"].items())
        for name, cost in zip(names, costs, strict=True)
    ]
    return draw(
        "What a pass costs: T(N)",
        "Milliseconds of a pass over N nodes. " + "; ".join(said),
        140 + 10 * len(costs),
        paint,
    )


def _line(i: int) -> dict[str, Any]:
    style = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)]}
    return style | {"markersize": 3.5, "linewidth": 1.3}


def _ticks(axes: Axes, at: Iterable[float]) -> None:
    at = list(at)
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.set_xticks([], minor=True)


def _whole(last: int, first: int = 0) -> list[int]:
    """Up to about eight whole numbers from ``first`` to ``last``."""
    return list(range(first, last + 1, max(1, -(-last // 8))))
