"""``specdec bench`` and ``specdec demo``: methods compared with plain ``generate``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import bench_show, console
from specdec.commands.options import JsonOption, ModelOption, QuickOption, TokensOption

if TYPE_CHECKING:
    from specdec.bench.run import Comparison
    from specdec.bench.workloads import Prompt

METHODS = "plain,plain+kernels,auto,auto+kernels,prompt-lookup,prompt-lookup+kernels"
QUICK = ("chat", "code", "code_edit", "extraction", "sql", "retrieval")
DEMO = ("chat", "code", "code_edit", "summary", "extraction", "translation", "mathematics", "sql")
QUICK_TOKENS = 32
INTERRUPTED = 130  # the exit status that shells give for Ctrl-C


def bench(
    model: ModelOption = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: plain; ours as DRAFTER[@POLICY[@VERIFIER]], e.g. auto, suffix, "
            "recycling@fixed:64:8:8 or my.module:MyDrafter@auto; rivals prompt-lookup, assisted, assisted:PATH, "
            "compiled, economize, flashspec, adapter:MODULE:FUNCTION. Each also +kernels. See docs/metrics.md."
        ),
    ] = METHODS,
    workloads: Annotated[str, typer.Option(help="Kinds of work, separated by commas; all by default.")] = "",
    questions: Annotated[
        Path | None, typer.Option("--questions", "--data", help="Questions of your own: a file or folder.")
    ] = None,
    prompts_per_workload: Annotated[int, typer.Option(min=0, help="The first N prompts of each kind; 0 for all.")] = 0,
    max_new_tokens: TokensOption = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt at most.")] = 5,
    width: Annotated[
        float, typer.Option(min=0.0, help="Repeat until what measuring adds to each speed is narrower, in percent.")
    ] = 10.0,
    time_cap: Annotated[
        float, typer.Option(min=0.0, help="Minutes of measuring after which nothing is repeated.")
    ] = 30.0,
    dtype: Annotated[str, typer.Option(help="Number format of the weights: float32, bfloat16 or float16.")] = "float32",
    quick: QuickOption = False,
    allow_disturbed: Annotated[
        bool, typer.Option("--allow-disturbed", help="Tell speeds although other load disturbed them.")
    ] = False,
    runs: Annotated[Path | None, typer.Option(help="Where finished runs are kept; by default beside the JSON.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on with kept runs.")] = False,
    json_path: JsonOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to look at here.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Record one generation of each kind here.")] = None,
) -> None:
    """Compare methods with plain generate: equal tokens first, then speed, until the figures are sure enough.

    Stopped with Ctrl-C it goes on where it stood when given the same command, with --json or --runs.
    """
    from specdec.bench.compare import begin, finish, record
    from specdec.bench.methods import known

    with console.told(ValueError, OSError):
        names = [known(name) for name in console.split(methods)]
        prompts = _prompts(console.split(workloads), questions, quick, prompts_per_workload)
        _check_outputs(json_path, runs, html, trace)
    if quick:
        max_new_tokens, repeats = min(max_new_tokens, QUICK_TOKENS), 1
    if runs is None and json_path is not None:
        runs = json_path.with_name(f"{json_path.name}.runs.jsonl")
    target, tokenizer = console.load(model, dtype)
    with console.told(ValueError, OSError), console.notes.status("encoding prompts"):
        comparison = begin(target, tokenizer, prompts, names, max_new_tokens, name=model, runs=runs, fresh=fresh)
    _run(comparison, repeats, width / 100, 60 * time_cap)
    with console.notes.status("measuring what a step costs"):
        report = finish(comparison, tokenizer, model, allow_disturbed)
    with console.told(ValueError, OSError):
        if json_path:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
        if trace:
            record(comparison, report["results"], tokenizer, trace)
        if html:
            _write_page(html, report, trace)
    if comparison.file is not None:
        comparison.file.write("done")
    bench_show.report(report)
    raise typer.Exit(1 if report["disturbance"]["refused"] else 0)


def demo(
    path: Annotated[bool, typer.Option("--path", help="Only make the model ready and print its directory.")] = False,
    quick: QuickOption = False,
) -> None:
    """Show on a real model and eight kinds of work that the tokens are the same, and how much faster they come."""
    if path:
        typer.echo(console.resolve("demo"))
        return
    from specdec.bench.compare import begin
    from specdec.bench.report import report
    from specdec.bench.workloads import first_of_each, own

    target, tokenizer = console.load("demo")
    prompts = first_of_each(own(DEMO), 1 if quick else 2)
    with console.notes.status("encoding prompts"):
        comparison = begin(target, tokenizer, prompts, ["auto+kernels"], QUICK_TOKENS if quick else 64, name="demo")
    _run(comparison, 1)
    bench_show.report(report(comparison, "demo", tokenizer, allow_disturbed=True))
    raise typer.Exit(1 if comparison.differences else 0)


def _prompts(workloads: Sequence[str], questions: Path | None, quick: bool, count: int) -> list[Prompt]:
    from specdec.bench.workloads import first_of_each, own, read

    if not questions:
        prompts = own(workloads or (QUICK if quick else ()))
    else:
        prompts = [prompt for prompt in read(questions) if not workloads or prompt.workload in workloads]
    if not prompts:
        raise ValueError(f"{questions} has no question of {', '.join(workloads)}")
    count = 1 if quick else count
    return first_of_each(prompts, count) if count else prompts


def _check_outputs(json_path: Path | None, runs: Path | None, html: Path | None, trace: Path | None) -> None:
    """Raise ValueError now for what would fail after everything has been measured."""
    for path in filter(None, (json_path, runs, html, trace)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.parent}")
    if html and find_spec("matplotlib") is None:
        raise ValueError("--html needs matplotlib: pip install 'specdec-runtime[report]'")


def _run(comparison: Comparison, repeats: int, width: float = 0.0, seconds: float = math.inf) -> None:
    """Run it with a bar of progress; on Ctrl-C say how to go on."""
    try:
        with bench_show.Live(comparison) as live:
            comparison.run(repeats, width, seconds, live.tell)
    except KeyboardInterrupt as stop:
        kept = f"the same command goes on with what {comparison.file.path} keeps" if comparison.file else (
            "nothing is kept; --json or --runs would keep what is finished"
        )  # fmt: skip
        console.notes.print(f"interrupted: {kept}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from stop


def _write_page(path: Path, report: dict[str, Any], trace: Path | None) -> None:
    from specdec.page import write_page
    from specdec.trace import read_trace

    write_page(path, report, read_trace(trace) if trace else None)
