"""Write the figures of README.md and docs/*.md from ``benchmarks/results/*.json``; ``--check`` only compares.

``specdec bench --json`` writes reports of speed, ``benchmarks/cost.py --json`` those of what a pass costs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tables import agents, costs, drafts, hindsight, long, speeds, text

ROOT = Path(__file__).resolve().parent.parent
BRIEF = ("plain+kernels", "auto", "auto+kernels", "prompt-lookup", "prompt-lookup+kernels")


def main() -> None:
    """Rewrite the pages, or exit with a message where one is not what the results say."""
    results = ROOT / "benchmarks" / "results"
    for page, sections in {
        ROOT / "README.md": {"figures": speeds.figures(results, BRIEF)},
        ROOT / "docs" / "performance.md": {
            "costs": costs.costs(results),
            "speeds": speeds.figures(results, against=True),
            "the same twice": speeds.same_twice(results),
            "hindsight": hindsight.hindsight(results),
            "nothing to gain": costs.adversarial(results),
            "suffix trees": text.suffix_table(results),
        },
        ROOT / "docs" / "model_drafters.md": {"drafts": drafts.drafts(results)},
        ROOT / "docs" / "sessions.md": {"sessions": agents.sessions(results)},
        ROOT / "docs" / "pool.md": {"throughput": agents.pool(results)},
        ROOT / "docs" / "integrations.md": {"libraries": agents.integrations(results)},
        ROOT / "docs" / "long_context.md": {
            "long contexts": long.long_context(results),
            "long documents": long.long_documents(results),
            "longspec": long.longspec(results),
            "shared prefixes": long.shared_prefix(results),
        },
    }.items():
        old = new = page.read_text()
        for name, section in sections.items():
            new = replaced(new, name, section)
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


if __name__ == "__main__":
    main()
