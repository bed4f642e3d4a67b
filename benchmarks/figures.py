"""Write the figures of README.md and docs/performance.md from ``benchmarks/results/*.json``; ``--check`` only compares.

``specdec bench --json`` writes reports of speed, ``benchmarks/cost.py --json`` those of what a pass costs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BRIEF = ("plain+kernels", "auto", "auto+kernels", "prompt-lookup", "prompt-lookup+kernels")
Report = dict[str, Any]


def main() -> None:
    """Rewrite both pages, or exit with a message where one is not what the results say."""
    results = ROOT / "benchmarks" / "results"
    for page, sections in {
        ROOT / "README.md": {"figures": figures(results, BRIEF)},
        ROOT / "docs" / "performance.md": {
            "costs": costs(results),
            "speeds": figures(results, against=True),
            "nothing to gain": adversarial(results),
            "suffix trees": suffix_table(results),
        },
    }.items():
        old = new = page.read_text()
        for name, text in sections.items():
            new = replaced(new, name, text)
        if new != old and "--check" in sys.argv[1:]:
            sys.exit(f"{page}: its figures are not those of {results}; run python benchmarks/figures.py")
        if new != old:
            page.write_text(new)


def replaced(text: str, name: str, figures: str) -> str:
    """The text with what stands between a section's markers replaced. Raises ValueError where a marker is missing."""
    begin, end = f"<!-- {name}: written by benchmarks/figures.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{figures}\n\n{end}{after}"


def figures(directory: Path, methods: Sequence[str] = (), against: bool = False) -> str:
    """All reports of speed in a directory in Markdown.

    Args:
        methods: which to show; all by default.
        against: whether to show speeds over other methods than plain ``generate`` too.
    """
    return (
        "\n\n".join(section(report, methods, against) for report in _read(directory, "overhead")) or "not measured yet"
    )


def costs(directory: Path) -> str:
    """All reports of what a pass costs in Markdown."""
    return "\n\n".join(map(cost_section, _read(directory, "products"))) or "not measured yet"


def _read(directory: Path, key: str) -> list[Report]:
    """Those with a key that only their kind has."""
    reports = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [report for report in reports if key in report]


def section(report: Report, methods: Sequence[str], against: bool) -> str:
    """One report: what it holds for, speeds by workload and method, and what a step costs beside the pass."""
    _check_quiet(report)
    parts = [_speed_machine(report), _table(report["results"], methods), _loops(report["results"], methods)]
    others = report.get("against", []) if against else []
    for baseline in dict.fromkeys(r["baseline"] for r in others):
        shown = [r for r in others if r["baseline"] == baseline and r["method"].endswith("+kernels")]
        parts += [f"The same runs with `{baseline}` in place of plain `generate`:", _table(shown, methods)]
    parts.append(_overhead(report["overhead"]))
    parts += [f"`{name}` did not run: {reason}." for name, reason in report.get("unavailable", {}).items() if against]
    if report["differences"]:
        parts.append(
            "Tokens differed, hence no speed:\n\n" + "\n".join(f"- {d['text']}" for d in report["differences"])
        )
    return "\n\n".join(part for part in parts if part)


def _check_quiet(report: Report) -> None:
    """Exit where other load disturbed the run: such figures are not for showing."""
    disturbance = report.get("disturbance", {})
    if disturbance.get("disturbed"):
        sys.exit(f"{report['machine']['model']}: measured beside other load, measure again: {disturbance['text']}")


def _loops(results: Sequence[Report], methods: Sequence[str]) -> str:
    """How many answers loop, and what the speeds are without those; nothing where none does."""
    whole = [r for r in results if r["workload"] == "all" and r["method"] not in ("plain", r["baseline"])]
    shown = [r for r in whole if r["method"] in (methods or [r["method"]]) and r.get("speedup_without_loops")]
    if not any(r["loops"] for r in shown):
        return ""
    figures = ", ".join(f"{r['method']} {r['speedup_without_loops']:.2f}x" for r in shown)
    first = shown[0]
    return f"{first['loops']} of {first['prompts']} answers end in a loop. Over all without them: {figures}."


def _machine(m: dict[str, Any]) -> str:
    return (
        f"{m['model']} ({m['parameters'] / 1e6:.0f}M parameters, {m['dtype']}, {m['attention']} attention) on "
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}"
    )


def _speed_machine(report: Report) -> str:
    return (
        f"{_machine(report['machine'])}; greedy, batch "
        f"1, at most {report['max_new_tokens']} tokens, timed runs of each prompt: up to {report['repeats']}. Speed of "
        "decoding over plain `generate` (median over prompts, in brackets its 95% interval) / tokens per pass:"
    )


def _table(results: Sequence[Report], methods: Sequence[str]) -> str:
    names = [name for name in dict.fromkeys(r["method"] for r in results) if name in (methods or [name])]
    names = [name for name in names if name not in ("plain", results[0]["baseline"])]
    cells = {(r["workload"], r["method"]): _cell(r) for r in results}
    rows = [[workload, *(cells[workload, name] for name in names)] for workload in dict.fromkeys(w for w, _ in cells)]
    return _rows(["workload", *names], rows)


def _cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    if r["speedup"] is None:
        return "-"
    spread = "" if r["speedup_low"] is None else f" ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})"
    steps = "-" if r["tokens_per_step"] is None else f"{r['tokens_per_step']:.2f}"
    return f"{r['speedup']:.2f}x{spread} / {steps}"


def _overhead(cost: Report) -> str:
    return (
        f"Outside the target's pass a step takes {cost['outside_ms']:.2f} ms, {cost['ratio']:.1%} of the pass's "
        f"{cost['pass_ms']:.1f} ms ({cost['drafter']}, {cost['nodes']} nodes)."
    )


def cost_section(report: Report) -> str:
    """One report: the machine's limit, T(N) by context, and single products by shape."""
    limit = (
        f"{_machine(report['machine'])}. It reads {report['bandwidth'] / 1e9:.1f} GB/s, so that the "
        f"{report['weight_bytes'] / 1e6:.0f} MB of weights take {1e3 * report['limit']:.1f} ms, the limit. "
        f"Milliseconds of a pass / the limit as a share of it / T(N) over T(1) (medians of {report['repeats']}):"
    )
    single = "Microseconds of one product, torch's / oneDNN's prepacked / ours, by shape of the weight and rows:"
    parts = [limit, _pass_table(report), _goals(report), single, _product_table(report["products"])]
    return "\n\n".join(part for part in parts if part)


def _goals(report: Report) -> str:
    """What was aimed at, and what came out, where it was measured."""
    ours = {r["nodes"]: r["ours"] for r in report["passes"] if r["context"] == 256}
    if not {1, 4, 8, 16} <= set(ours):
        return ""
    ratios = {"T(1) / limit": ours[1] / report["limit"]} | {f"T({n}) / T(1)": ours[n] / ours[1] for n in (4, 8, 16)}
    rows = [["goal", "1.30", "1.10", "1.30", "1.70"], ["ours", *(f"{ratio:.2f}" for ratio in ratios.values())]]
    return f"Behind 256 tokens, against what was aimed at:\n\n{_rows(['', *ratios], rows)}"


def _pass_table(report: Report) -> str:
    nodes = sorted({r["nodes"] for r in report["passes"]})
    taken = {(r["context"], kind, r["nodes"]): r[kind] for r in report["passes"] for kind in ("plain", "ours")}
    rows = []
    for context, kind in dict.fromkeys((context, kind) for context, kind, _ in taken):
        times, one = [taken[context, kind, n] for n in nodes], taken[context, kind, 1]
        cells = [f"{1e3 * t:.1f} / {report['limit'] / t:.0%} / {t / one:.2f}" for t in times]
        rows.append([f"{context}, {kind}", *cells])
    return _rows(["context", *(f"N = {n}" for n in nodes)], rows)


def _product_table(products: Sequence[Report]) -> str:
    counts = sorted({p["rows"] for p in products})
    cells = {
        (f"{p['outputs']} x {p['inputs']}", p["rows"]): " / ".join(
            f"{1e6 * p[kind]:.0f}" for kind in ("torch", "prepacked", "ours")
        )
        for p in products
    }
    rows = [[shape, *(cells[shape, n] for n in counts)] for shape in dict.fromkeys(shape for shape, _ in cells)]
    return _rows(["weight", *(f"{n} rows" for n in counts)], rows)


def adversarial(directory: Path) -> str:
    """What benchmarks/adversarial.py found, in Markdown."""
    return "\n\n".join(map(_adversarial_section, _read(directory, "adversarial"))) or "not measured yet"


def _adversarial_section(report: Report) -> str:
    head = f"{_machine(report['machine'])}; {report['max_new_tokens']} tokens, those after the first timed:"
    rows = [
        [r["case"], str(r["rows"]), f"{r['speed']:.3f}x ({r['low']:.3f}-{r['high']:.3f})", str(r["drafted"])]
        for r in report["adversarial"]
    ]
    names = ["text", "rows", "speed over plain decoding with our kernels", "guessed in the last run"]
    return f"{head}\n\n{_rows(names, rows)}"


def suffix_table(directory: Path) -> str:
    """What benchmarks/suffix_cache.py and suffix_append.py found, in Markdown."""
    parts = [_replay_table(report) for report in _read(directory, "replays")]
    parts += [_append_table(report["append"]) for report in _read(directory, "append")]
    return "\n\n".join(parts) or "not measured yet"


def _replay_table(report: Report) -> str:
    """One line of each trace, one column of each player."""
    names = list(dict.fromkeys(r["who"] for r in report["replays"]))
    rows: dict[str, list[str]] = {}
    for r in report["replays"]:
        cell = f"{r['tokens_per_step']:.3f} / {r['us_per_token']:.1f} / {r['bytes_per_token']:.0f}"
        rows.setdefault(f"{r['trace']} ({r['tokens']} tokens)", []).append(cell)
    head = f"Tokens per step / microseconds per token / bytes per token, at most {report['nodes']} guesses per step:"
    return f"{head}\n\n{_rows(['trace', *names], [[trace, *cells] for trace, cells in rows.items()])}"


def _append_table(append: dict[str, list[Report]]) -> str:
    """One line of each limit of memory, one column of each million tokens."""
    millions = [f"{r['million']}" for r in next(iter(append.values()))]
    rows = [
        [limit, *(f"{r['us_per_token']:.1f} / {r['bytes_per_token_held']:.0f}" for r in taken)]
        for limit, taken in append.items()
    ]
    head = "Microseconds of appending a token, in each million of them / bytes of each that is held, by `max_bytes`:"
    return f"{head}\n\n{_rows(['million', *millions], rows)}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
