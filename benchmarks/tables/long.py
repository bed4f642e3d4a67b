"""Reports of long contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tables.markdown import Report, machine, read, table, times


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


def long_context(directory: Path) -> str:
    """What benchmarks/long_context.py found, in Markdown."""
    return "\n\n".join(map(_long_section, read(directory, "needles"))) or "not measured yet"


def _long_section(report: Report) -> str:
    trained, budget, window = report["trained"], report["budget"], report["window"]
    parts = [
        f"{machine(report['machine'])}. {budget} tokens retrieved, a window of {window} and four sinks. Milliseconds "
        "of a pass over 1 token / over 8 / MB of KV rows:",
        _across(report["passes"], "cache", _pass_cell),
        f"Building the retrieved rows for the first time: {', '.join(_builds(report['passes']))}.",
        "KiB that a drafter holds for a text, all of two layers of one head of 64:",
        _across(report["memory"], "drafter", lambda r: f"{r['bytes'] / 2**10:.0f}"),
        f"A model of {trained['parameters'] / 1e6:.1f}M parameters, trained for {trained['steps']} steps to find "
        "records in noise. What it still knows, given what came before, of the record asked for, for which rows were "
        "retrieved (in chunks of 8 or 1) / of the next one, which that one names:",
        _across(report["needles"], "cache", lambda r: f"{r['recall']:.0%} / {r['recall_next']:.0%}"),
        "It writes record after record, greedily. Speed over plain decoding with the same kernels / tokens per step / "
        "guesses accepted (answers right, for plain):",
        _across(report["decoding"], "method", _decoding_cell),
    ]
    return "\n\n".join(parts)


def long_documents(directory: Path) -> str:
    """What benchmarks/long_documents.py found, in Markdown."""
    return "\n\n".join(map(_documents_section, read(directory, "long_documents"))) or "not measured yet"


def _documents_section(report: Report) -> str:
    rows = report["long_documents"]
    head = (
        f"{machine(report['machine'])}; {rows[0]['answers']} questions behind {report['context']} tokens of documents. "
        f"The sentence asked for was {'' if report['told'] else 'not '}found, by any method as by plain decoding. "
        "Speed over plain decoding with the same kernels / tokens per step / guesses accepted:"
    )
    cells = [[r["method"], f"{times(r)} / {r['tokens_per_step']:.2f} / {r['accepted']:.0%}"] for r in rows]
    return f"{head}\n\n{table(['method', 'speed'], cells)}"


def _across(results: Sequence[Report], key: str, cell: Callable[[Report], str]) -> str:
    """A table with a row for each name and a column for each context."""
    contexts, names = (list(dict.fromkeys(r[part] for r in results)) for part in ("context", key))
    cells = {(r[key], r["context"]): cell(r) for r in results}
    rows = [[name, *(cells[name, n] for n in contexts)] for name in names]
    return table([key, *(f"{n} tokens" for n in contexts)], rows)


def _builds(passes: Sequence[Report]) -> list[str]:
    return [f"{1e3 * r['seconds_build']:.0f} ms at {r['context']}" for r in passes if "seconds_build" in r]


def _pass_cell(r: Report) -> str:
    return f"{1e3 * r['seconds_1']:.1f} / {1e3 * r['seconds_8']:.1f} / {r['bytes'] / 1e6:.0f}"


def _decoding_cell(r: Report) -> str:
    if r["method"] == "plain":
        return f"{r['tokens_per_second']:.0f} tokens/s (right: {r['right']:.0%})"
    return f"{times(r)} / {r['tokens_per_step']:.2f} / {r['accepted']:.0%}"


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
