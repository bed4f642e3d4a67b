"""Write the README's figures from ``benchmarks/results/*.json``, between its markers; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->", "<!-- end of figures -->"


def main() -> None:
    """Rewrite the README, or exit with a message where it is not what the results say."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = replaced(old, figures(ROOT / "benchmarks" / "results"))
    if "--check" not in sys.argv[1:]:
        readme.write_text(new)
    elif new != old:
        sys.exit("README.md: its figures are not those of benchmarks/results; run python benchmarks/figures.py")


def replaced(text: str, figures: str) -> str:
    """The text with what stands between its markers replaced. Raises ValueError where a marker is missing."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def figures(directory: Path) -> str:
    """All reports of a directory in Markdown."""
    reports = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return "\n\n".join(map(section, reports)) or "not measured yet"


def section(report: dict[str, Any]) -> str:
    """One report: what it holds for, speeds by workload and method, and what a step costs beside the pass."""
    parts = [_machine(report), _table(report["results"]), _overhead(report["overhead"])]
    if report["differences"]:
        parts.append("Tokens differed, hence no speed:\n\n" + "\n".join(f"- {line}" for line in report["differences"]))
    return "\n\n".join(parts)


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    return (
        f"{m['model']} ({m['parameters'] / 1e6:.0f}M parameters, {m['dtype']}, {m['attention']} attention) on "
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}; greedy, batch "
        f"1, at most {report['max_new_tokens']} tokens, timed runs of each prompt: {report['repeats']}. Speed of "
        "decoding over plain `generate` (median over prompts, in brackets its 95% interval) / tokens per pass:"
    )


def _table(results: list[dict[str, Any]]) -> str:
    methods = [name for name in dict.fromkeys(r["method"] for r in results) if name != "plain"]
    cells = {(r["workload"], r["method"]): _cell(r) for r in results}
    lines = ["| workload | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for workload in dict.fromkeys(r["workload"] for r in results):
        lines.append(f"| {workload} | " + " | ".join(cells[workload, method] for method in methods) + " |")
    return "\n".join(lines)


def _cell(r: dict[str, Any]) -> str:
    if not r["equal"]:
        return "tokens differ"
    if r["speedup"] is None:
        return "-"
    spread = "" if r["speedup_low"] is None else f" ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})"
    return f"{r['speedup']:.2f}x{spread} / {r['tokens_per_step']:.2f}"


def _overhead(cost: dict[str, Any]) -> str:
    return (
        f"Outside the target's pass a step takes {cost['outside_ms']:.2f} ms, {cost['ratio']:.1%} of the pass's "
        f"{cost['pass_ms']:.1f} ms ({cost['drafter']}, {cost['nodes']} nodes)."
    )


if __name__ == "__main__":
    main()
