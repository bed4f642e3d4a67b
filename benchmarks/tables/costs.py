"""Reports of what a pass costs, and of what speculation costs where it cannot help."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tables.markdown import Report, machine, read, table


def costs(directory: Path) -> str:
    """All reports of what a pass costs in Markdown."""
    return "\n\n".join(map(cost_section, read(directory, "products"))) or "not measured yet"


def cost_section(report: Report) -> str:
    """One report: the machine's limit, T(N) by context, and single products by shape."""
    limit = (
        f"{machine(report['machine'])}. It reads {report['bandwidth'] / 1e9:.1f} GB/s (at best "
        f"{report['best_bandwidth'] / 1e9:.1f}), so that the "
        f"{report['weight_bytes'] / 1e6:.0f} MB of weights take {1e3 * report['limit']:.1f} ms, the limit. "
        f"Milliseconds of a pass / the limit as a share of it / T(N) over T(1) (medians of {report['repeats']} rounds):"
    )
    single = "Microseconds of one product, torch's / oneDNN's prepacked / ours, by shape of the weight and rows:"
    parts = [limit, _pass_table(report), goals(report), single, _product_table(report["products"])]
    return "\n\n".join(part for part in parts if part)


def goals(report: Report) -> str:
    """What was aimed at, and what came out: in this process and, the slowest readers first, in those before it."""
    others = sorted(report.get("processes", []), key=lambda each: float(each["bandwidth"]))
    found = [each for each in map(_found, [*others, report]) if each]
    if not found:
        return ""
    names = [*(f"process {i}" for i in range(1, len(found))), "the table's"]
    rows = [[name, *map("{:.2f}".format, each)] for name, each in zip(names, found, strict=True)]
    middle = [f"{statistics.median(column):.2f}" for column in zip(*found, strict=True)]
    rows += [["median", *middle]] if len(found) > 1 else []
    head = ["", "GB/s", "T(1) in ms", "T(1) / limit", *(f"T({n}) / T(1)" for n in (4, 8, 16))]
    aims = ["goal", "", "", "1.30", "1.10", "1.30", "1.70"]
    return f"Behind 256 tokens, against what was aimed at:\n\n{table(head, [aims, *rows])}"


def _found(report: Report) -> list[float]:
    """GB/s, and what goals are for; empty where that was not measured."""
    ours = {r["nodes"]: r["ours"] for r in report["passes"] if r["context"] == 256}
    if not {1, 4, 8, 16} <= set(ours):
        return []
    own = [report["bandwidth"] / 1e9, 1e3 * ours[1], ours[1] / report["limit"]]
    return own + [ours[n] / ours[1] for n in (4, 8, 16)]


def _pass_table(report: Report) -> str:
    nodes = sorted({r["nodes"] for r in report["passes"]})
    taken = {(r["context"], kind, r["nodes"]): r[kind] for r in report["passes"] for kind in ("plain", "ours")}
    rows = []
    for context, kind in dict.fromkeys((context, kind) for context, kind, _ in taken):
        times, one = [taken[context, kind, n] for n in nodes], taken[context, kind, 1]
        cells = [f"{1e3 * t:.1f} / {report['limit'] / t:.0%} / {t / one:.2f}" for t in times]
        rows.append([f"{context}, {kind}", *cells])
    return table(["context", *(f"N = {n}" for n in nodes)], rows)


def _product_table(products: Sequence[Report]) -> str:
    counts = sorted({p["rows"] for p in products})
    cells = {
        (f"{p['outputs']} x {p['inputs']}", p["rows"]): " / ".join(
            f"{1e6 * p[kind]:.0f}" for kind in ("torch", "prepacked", "ours")
        )
        for p in products
    }
    rows = [[shape, *(cells[shape, n] for n in counts)] for shape in dict.fromkeys(shape for shape, _ in cells)]
    return table(["weight", *(f"{n} rows" for n in counts)], rows)


def adversarial(directory: Path) -> str:
    """What benchmarks/adversarial.py found, in Markdown."""
    return "\n\n".join(map(_adversarial_section, read(directory, "adversarial"))) or "not measured yet"


def _adversarial_section(report: Report) -> str:
    head = f"{machine(report['machine'])}; {report['max_new_tokens']} tokens, those after the first timed:"
    rows = [
        [r["case"], str(r["rows"]), f"{r['speed']:.3f}x ({r['low']:.3f}-{r['high']:.3f})", str(r["drafted"])]
        for r in report["adversarial"]
    ]
    names = ["text", "rows", "speed over plain decoding with our kernels", "guessed in the last run"]
    return f"{head}\n\n{table(names, rows)}"
