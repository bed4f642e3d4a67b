"""``specdec replay``: drafters against recorded responses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from specdec.commands import console
from specdec.commands.options import JsonOption

if TYPE_CHECKING:
    from specdec.core import Budget, Drafter
    from specdec.traces import Response


def replay(
    traces: Annotated[list[Path], typer.Argument(help="JSONL files of recorded responses; see docs/replay.md.")],
    tokenizer: Annotated[str | None, typer.Option(help="A directory or hub id; unused where traces hold ids.")] = None,
    drafters: Annotated[str, typer.Option(help="Names, separated by commas.")] = "ngram,recycling,auto",
    nodes: Annotated[int, typer.Option(min=0, help="Guessed tokens in a step at most.")] = 32,
    depth: Annotated[int, typer.Option(min=1, help="Guessed tokens on one path at most.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Guesses of one token at most.")] = 4,
    namespace: Annotated[str | None, typer.Option(help="One memory for all files; by default, each its own.")] = None,
    cost: Annotated[Path | None, typer.Option(help="Measured seconds of a pass by tokens, to project speed.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Play drafters against recorded responses, without a model: tokens per step, and what drafting costs."""
    from specdec.core import Budget
    from specdec.tally import read_cost

    names, words = console.split(drafters), console.load_tokenizer(tokenizer) if tokenizer else None
    with console.told(ValueError, OSError):
        seconds = read_cost(cost, nodes + 1) if cost else None
        for name in names:
            _made(name)  # an unknown name is told before the work
        responses = _read(traces, words, namespace)
        results = _play(names, responses, Budget(nodes, depth, width), seconds)
        if json_path:
            settings = {"traces": [str(path) for path in traces], "tokenizer": tokenizer, "namespace": namespace}
            report = {**settings, "nodes": nodes, "depth": depth, "width": width, "results": results}
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    _show(results)


def _read(traces: list[Path], tokenizer: Any, namespace: str | None) -> list[Response]:
    from specdec.traces import read

    with console.notes.status("reading"):
        responses = [response for path in traces for response in read(path, tokenizer, namespace)]
    if not responses:
        raise ValueError(f"no recorded answers in {', '.join(map(str, traces))}")
    return responses


def _play(
    names: list[str], responses: list[Response], budget: Budget, cost: dict[int, float] | None
) -> list[dict[str, Any]]:
    """Each drafter's row, with a bar of progress for each."""
    from specdec.replay import replay
    from specdec.tally import result

    results = []
    with Progress(console=console.notes, transient=True) as progress:
        bars = [progress.add_task(name, total=len(responses)) for name in names]
        for name, bar in zip(names, bars, strict=True):
            replay(responses[:1], _made(name), budget)  # what is loaded or compiled only once is not timed
            sessions = replay(responses, _made(name), budget, partial(progress.advance, bar))
            results.append(result(name, sessions, cost))
    return results


def _made(name: str) -> Drafter:
    """The named drafter. Without a target's passes beside it no part of a merged one is too slow to be asked."""
    from specdec.drafters import MergedDrafter
    from specdec.speculate import make_drafter

    drafter = make_drafter(name)
    if isinstance(drafter, MergedDrafter):
        drafter.clock = lambda: 0.0
    return drafter


def _show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "drafter", "sessions", "tokens", "per step", "accepted", "draft us", "update us", "bytes", "speed", box=None
    )
    for r in results:
        share = f"{r['accepted']} of {r['drafted']}"
        step, draft, update = (
            f"{r[key]:.2f}" for key in ("tokens_per_step", "draft_us_per_token", "update_us_per_token")
        )
        held, speed = ("-" if r.get(key) is None else f"{r[key]:.2f}" for key in ("bytes_per_token", "projected_speed"))
        table.add_row(r["drafter"], str(r["sessions"]), str(r["tokens"]), step, share, draft, update, held, speed)
    console.show(table)
