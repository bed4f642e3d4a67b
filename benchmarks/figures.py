"""Write the figures of README.md and docs/*.md from ``benchmarks/results/*.json``; ``--check`` only compares.

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
    """Rewrite the pages, or exit with a message where one is not what the results say."""
    results = ROOT / "benchmarks" / "results"
    for page, sections in {
        ROOT / "README.md": {"figures": figures(results, BRIEF)},
        ROOT / "docs" / "performance.md": {
            "costs": costs(results),
            "speeds": figures(results, against=True),
            "nothing to gain": adversarial(results),
            "suffix trees": suffix_table(results),
        },
        ROOT / "docs" / "model_drafters.md": {"drafts": drafts(results)},
        ROOT / "docs" / "sessions.md": {"sessions": sessions(results)},
        ROOT / "docs" / "pool.md": {"throughput": pool(results)},
        ROOT / "docs" / "integrations.md": {"libraries": integrations(results)},
        ROOT / "docs" / "long_context.md": {
            "longspec": longspec(results),
            "shared prefixes": shared_prefix(results),
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


def drafts(directory: Path) -> str:
    """What benchmarks/drafts.py found, in Markdown."""
    return "\n\n".join(map(_drafts_section, _read(directory, "drafts"))) or "not measured yet"


def _drafts_section(report: Report) -> str:
    """One table of each temperature and number of prompts at once."""
    _check_quiet(report)
    tables = [
        f"{_machine(report['machine'])}; {report['prompts']} prompts, at most {report['max_new_tokens']} tokens. In "
        "brackets 95% intervals:"
    ]
    for rows, temperature in dict.fromkeys((r["rows"], r["temperature"]) for r in report["drafts"]):
        shown = [r for r in report["drafts"] if (r["rows"], r["temperature"]) == (rows, temperature)]
        cells = [[r["method"], f"{r['tokens_per_step']:.2f}", *_draft_cells(r)] for r in shown]
        names = ["method", "tokens per step", "tokens per second", "over plain", "over assisted"]
        tables.append(f"Temperature {temperature:g}, {rows} at once:\n\n{_rows(names, cells)}")
    return "\n\n".join(tables)


def _draft_cells(r: Report) -> list[str]:
    if not r["equal"]:
        return ["tokens differ", "", ""]
    ratios = [_ratio(r, name) for name in ("speedup", "over_assisted")]
    return [f"{r['tokens_per_second']:.1f}", *ratios]


def _ratio(r: Report, name: str) -> str:
    if name not in r:
        return "-"
    low, high = r.get(f"{name}_low"), r.get(f"{name}_high")
    return f"{r[name]:.2f}x" + ("" if low is None else f" ({low:.2f}-{high:.2f})")


def sessions(directory: Path) -> str:
    """What benchmarks/sessions.py found, in Markdown."""
    return "\n\n".join(map(_sessions_section, _read(directory, "sessions"))) or "not measured yet"


def _sessions_section(report: Report) -> str:
    head = (
        f"{_machine(report['machine'])}; greedy, at most {report['max_new_tokens']} tokens a turn, medians of "
        f"{report['repeats']}. Speed over eager `generate`, reading prompts included / tokens per pass / share of the "
        "prompts whose rows were kept:"
    )
    cells = {(r["agent"], r["method"]): _session_cell(r) for r in report["sessions"] if r["method"] != "eager"}
    eager = {r["agent"]: f"{r['seconds']:.1f} s" for r in report["sessions"] if r["method"] == "eager"}
    names = list(dict.fromkeys(method for _, method in cells))
    rows = [[agent, seconds, *(cells[agent, name] for name in names)] for agent, seconds in eager.items()]
    return f"{head}\n\n{_rows(['agent', 'eager', *names], rows)}"


def _session_cell(r: Report) -> str:
    return f"{_times(r)} / {r['tokens_per_step']:.2f} / {r['reused']:.0%}"


def pool(directory: Path) -> str:
    """What benchmarks/pool.py found, in Markdown."""
    return "\n\n".join(map(_pool_section, _read(directory, "pool"))) or "not measured yet"


def _pool_section(report: Report) -> str:
    head = (
        f"{_machine(report['machine'])}; {report['prompts']} prompts, greedy, at most {report['max_new_tokens']} "
        f"tokens, medians of {report['repeats']}. Tokens per second, reading prompts included (speed over one after "
        "another with speculation) / tokens of a row per pass, by requests at a time:"
    )
    cells = {(r["method"], r["sessions"]): _pool_cell(r) for r in report["pool"]}
    counts = sorted({sessions for _, sessions in cells})
    methods = dict.fromkeys(method for method, _ in cells)
    rows = [[method, *(cells.get((method, count), "") for count in counts)] for method in methods]
    missing = [f"`{name}` did not run: {why}." for name, why in report["unavailable"].items()]
    return "\n\n".join([head, _rows(["", *map(str, counts)], rows), *missing])


def _pool_cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    steps = "" if r["tokens_per_step"] is None else f" / {r['tokens_per_step']:.2f}"
    return f"{r['tokens_per_second']:.1f} ({_times(r)}){steps}"


def integrations(directory: Path) -> str:
    """What benchmarks/integrations.py found, in Markdown."""
    return "\n\n".join(map(_integrations_section, _read(directory, "integrations"))) or "not measured yet"


def _integrations_section(report: Report) -> str:
    head = (
        f"{_machine(report['machine'])}; greedy, medians of {report['repeats']}. Seconds without speculation, then "
        "speed over that / tokens per pass:"
    )
    results = report["integrations"]
    cells = {(r["task"], r["method"]): f"{_times(r)} / {r['tokens_per_step']:.2f}" for r in results}
    names = [name for name in dict.fromkeys(r["method"] for r in results) if name != "plain"]
    plain = {r["task"]: f"{r['seconds']:.1f} s" for r in results if r["method"] == "plain"}
    rows = [[task, seconds, *(cells.get((task, name), "") for name in names)] for task, seconds in plain.items()]
    missing = [f"`{name}` was left out: {why}." for name, why in report["unavailable"].items()]
    return "\n\n".join([head, _rows(["", "plain", *names], rows), *missing])


def longspec(directory: Path) -> str:
    """What benchmarks/longspec.py found, in Markdown."""
    return "\n\n".join(map(_longspec_section, _read(directory, "longspec"))) or "not measured yet"


def _longspec_section(report: Report) -> str:
    results, m = report["longspec"], report["machine"]
    head = (
        f"{m['model']} ({m['parameters'] / 1e6:.0f}M parameters, {m['dtype']}), {results[0]['prompts']} questions "
        f"behind each context, at most {report['max_new_tokens']} tokens, greedy chains of {report['depth']}. Tokens "
        "per step (least and most of a question) / share of the guesses that were right / KiB that the drafter holds "
        "for the text / MiB of the target's rows that it reads for each guess:"
    )
    cells = {(r["layer"], r["context"]): _longspec_cell(r) for r in results}
    contexts = list(dict.fromkeys(r["context"] for r in results))
    names = dict.fromkeys(r["layer"] for r in results)
    rows = [[_layer(name, report["trained"][name]), *(cells[name, n] for n in contexts)] for name in names]
    return f"{head}\n\n{_rows(['layer', *(f'{n} tokens' for n in contexts)], rows)}"


def _layer(name: str, size: Report) -> str:
    return f"{name} ({size['parameters'] / 1e6:.1f}M weights, window {size['window']})"


def _longspec_cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    steps = f"{r['tokens_per_step']:.2f} ({r['least']:.2f}-{r['most']:.2f})"
    return f"{steps} / {r['accepted']:.0%} / {r['bytes'] / 2**10:.0f} / {r['bytes_read'] / 2**20:.1f}"


def _times(r: Report) -> str:
    return f"{r['speedup']:.2f}x" if r["equal"] else "tokens differ"


def shared_prefix(directory: Path) -> str:
    """What benchmarks/shared_prefix.py found, in Markdown."""
    return "\n\n".join(map(_shared_section, _read(directory, "shared_prefix"))) or "not measured yet"


def _shared_section(report: Report) -> str:
    head = (
        f"{_machine(report['machine'])}; rows that are copies of {report['prefix']} tokens. Megabytes of KV rows / "
        "milliseconds of a pass over 1 token a row / over 8:"
    )
    rows = [[str(r["rows"]), "shared" if r["shared"] else "apart", *_shared_cells(r)] for r in report["shared_prefix"]]
    return f"{head}\n\n{_rows(['rows', '', 'MB', '1 token', '8 tokens'], rows)}"


def _shared_cells(r: Report) -> list[str]:
    return [f"{r['bytes'] / 1e6:.0f}", *(f"{1e3 * r[f'seconds_{n}']:.1f}" for n in (1, 8))]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
