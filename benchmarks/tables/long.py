"""Reports of long contexts."""

from __future__ import annotations

from pathlib import Path

from tables.markdown import Report, machine, read, table


def longspec(directory: Path) -> str:
    """What benchmarks/longspec.py found, in Markdown."""
    return "\n\n".join(map(_longspec_section, read(directory, "longspec"))) or "not measured yet"


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
    return f"{head}\n\n{table(['layer', *(f'{n} tokens' for n in contexts)], rows)}"


def _layer(name: str, size: Report) -> str:
    return f"{name} ({size['parameters'] / 1e6:.1f}M weights, window {size['window']})"


def _longspec_cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    steps = f"{r['tokens_per_step']:.2f} ({r['least']:.2f}-{r['most']:.2f})"
    return f"{steps} / {r['accepted']:.0%} / {r['bytes'] / 2**10:.0f} / {r['bytes_read'] / 2**20:.1f}"


def shared_prefix(directory: Path) -> str:
    """What benchmarks/shared_prefix.py found, in Markdown."""
    return "\n\n".join(map(_shared_section, read(directory, "shared_prefix"))) or "not measured yet"


def _shared_section(report: Report) -> str:
    head = (
        f"{machine(report['machine'])}; rows that are copies of {report['prefix']} tokens. Megabytes of KV rows / "
        "milliseconds of a pass over 1 token a row / over 8:"
    )
    rows = [[str(r["rows"]), "shared" if r["shared"] else "apart", *_shared_cells(r)] for r in report["shared_prefix"]]
    return f"{head}\n\n{table(['rows', '', 'MB', '1 token', '8 tokens'], rows)}"


def _shared_cells(r: Report) -> list[str]:
    return [f"{r['bytes'] / 1e6:.0f}", *(f"{1e3 * r[f'seconds_{n}']:.1f}" for n in (1, 8))]
