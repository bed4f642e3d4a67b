"""``specdec bench`` and ``specdec demo``: methods compared with plain ``generate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from specdec.commands import console
from specdec.commands.options import JsonOption, ModelOption, QuickOption, TokensOption

if TYPE_CHECKING:
    from specdec.bench.run import Comparison
    from specdec.bench.workloads import Prompt

AGAINST = ("plain+kernels", "compiled")  # what speeds are also taken over, besides plain generate


def bench(
    model: ModelOption = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="Of plain, ngram, recycling, auto, fixed:NODES, prompt-lookup, assisted, assisted:PATH, compiled, "
            "economize, flashspec; each also +kernels."
        ),
    ] = ("plain,plain+kernels,auto,auto+kernels,prompt-lookup,prompt-lookup+kernels"),
    workloads: Annotated[str, typer.Option(help="Kinds of work, separated by commas; all by default.")] = "",
    questions: Annotated[Path | None, typer.Option(help="JSONL with turns, messages or prompt in each line.")] = None,
    max_new_tokens: TokensOption = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt.")] = 3,
    dtype: Annotated[str, typer.Option(help="Number format of the weights: float32, bfloat16 or float16.")] = "float32",
    quick: QuickOption = False,
    json_path: JsonOption = None,
) -> None:
    """Compare methods with plain generate: equality first, then speed where tokens are equal."""
    from specdec.bench.methods import known
    from specdec.bench.report import machine, overhead, results
    from specdec.bench.workloads import first_of_each

    with console.told(ValueError, OSError):
        names = [known(name) for name in console.split(methods)]
        prompts = _prompts(console.split(workloads), questions)
    target, tokenizer = console.load(model, dtype)
    if quick:
        prompts, max_new_tokens, repeats = first_of_each(prompts, 1), min(max_new_tokens, 32), 1
    comparison = _compare(target, tokenizer, prompts, names, max_new_tokens, repeats)
    with console.notes.status("measuring what a step costs beside the target's pass"):
        beside = overhead(target, first_of_each(comparison.asks, 1)[:3], max_new_tokens)
    ran = set(comparison.names) - set(comparison.unavailable)
    report = {
        "machine": machine(target, model),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "results": results(comparison),
        "against": [r for name in AGAINST if name in ran for r in results(comparison, name)],
        "unavailable": comparison.unavailable,
        "differences": [str(difference) for difference in comparison.differences],
        "overhead": beside,
    }
    if json_path:
        with console.told(OSError):
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    _show(comparison)
    console.output.print(
        f"beside each pass of {beside['pass_ms']} ms: {beside['outside_ms']} ms (recycling at 64 nodes)"
    )


def demo(
    path: Annotated[bool, typer.Option("--path", help="Only make the model ready and print its directory.")] = False,
    quick: QuickOption = False,
) -> None:
    """Show on a real model and eight kinds of work that the tokens are the same, and how much faster they come."""
    if path:
        typer.echo(console.resolve("demo"))
        return
    from specdec.bench.workloads import first_of_each, own

    target, tokenizer = console.load("demo")
    prompts = first_of_each(own(), 1 if quick else 2)
    comparison = _compare(target, tokenizer, prompts, ["auto+kernels"], 32 if quick else 64, 1)
    _show(comparison)
    raise typer.Exit(1 if comparison.differences else 0)


def _prompts(workloads: Sequence[str], questions: Path | None) -> list[Prompt]:
    from specdec.bench.workloads import own, read

    if not questions:
        return own(workloads)
    prompts = [prompt for prompt in read(questions) if not workloads or prompt.workload in workloads]
    if not prompts:
        raise ValueError(f"{questions} has no question of {', '.join(workloads)}")
    return prompts


def _compare(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], names: Sequence[str], max_new_tokens: int, repeats: int
) -> Comparison:
    """Check, then time, with a bar of progress."""
    from specdec.bench.run import Comparison, encode_all

    with Progress(console=console.notes, transient=True) as progress:
        progress.add_task("encoding prompts", total=None)
        asks = encode_all(model, tokenizer, prompts, max_new_tokens)
        comparison = Comparison(model, asks, names, max_new_tokens)
        runs = len(asks) * len(comparison.names)
        checking = progress.add_task("checking equality", total=runs)
        comparison.check(lambda: progress.advance(checking))
        timing = progress.add_task("timing", total=runs * repeats)
        comparison.time(repeats, lambda: progress.advance(timing))
    return comparison


def _show(comparison: Comparison) -> None:
    """The figures as a table; then every difference."""
    from specdec.bench.report import results

    table = Table("workload", "method", "tokens", "equal", "per step", "per second", "speed", "95%", box=None)
    for r in results(comparison):
        keys = ("tokens_per_step", "tokens_per_second", "speedup", "speedup_low", "speedup_high")
        step, rate, speed, low, high = ("-" if r[key] is None else f"{r[key]:.2f}" for key in keys)
        equal, spread = "yes" if r["equal"] else "NO", "-" if low == "-" else f"{low} - {high}"
        table.add_row(r["workload"], r["method"], str(r["tokens"]), equal, step, rate, speed, spread)
    console.show(table)
    for name, reason in comparison.unavailable.items():
        console.output.print(f"{name} does not run: {reason}", highlight=False, soft_wrap=True)
    for difference in comparison.differences:
        console.output.print(f"differs: {difference}", style="red", highlight=False, soft_wrap=True)
