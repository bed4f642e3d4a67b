"""The command line: ``specdec generate``, ``specdec bench``, ``specdec demo``.

Heavy imports stand inside the commands, so that ``specdec --help`` answers at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from specdec.bench.run import Comparison
    from specdec.bench.workloads import Prompt

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
output, notes = Console(), Console(stderr=True)
WIDTH = 100  # of tables, at least: in a file too, no column may be cut

ModelOption = Annotated[str, typer.Option(help="A directory or hub id; 'demo' is SmolLM2-135M-Instruct.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="One prompt of each kind, few tokens, one repeat.")]


def _version(wanted: bool) -> None:
    if wanted:
        from specdec import __version__

        output.print(f"specdec {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Speculative decoding that makes model.generate faster and changes nothing else."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer.")],
    model: ModelOption = "demo",
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default where there is one.")] = None,
    drafter: Annotated[str, typer.Option(help="auto, ngram, recycling, or none for plain generate.")] = "auto",
    max_new_tokens: TokensOption = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="The text alone: no colours, no figures.")] = False,
) -> None:
    """Answer a prompt, each token in the colour of the drafter that guessed it."""
    import torch

    import specdec
    from specdec.printer import Printer

    target, tokenizer = _load(model)
    with _told(ValueError):
        ids = torch.tensor([_prompt_ids(tokenizer, prompt, chat)], device=target.device)
        stats = None if drafter == "none" else specdec.stats(specdec.wrap(target, drafter=drafter))
    printer = Printer(Console(color_system=None) if plain else output, tokenizer, stats)
    draw = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    start = time.perf_counter()
    target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=printer, **draw)
    if not plain:
        notes.print(printer.legend())
        notes.print(_pace(printer.shares.total(), stats.steps if stats else None, time.perf_counter() - start))


@app.command()
def bench(
    model: ModelOption = "demo",
    methods: Annotated[
        str, typer.Option(help="Of plain, ngram, recycling, auto, fixed:NODES, prompt-lookup; each also +kernels.")
    ] = ("plain,plain+kernels,auto,auto+kernels,prompt-lookup,prompt-lookup+kernels"),
    workloads: Annotated[str, typer.Option(help="Kinds of work, separated by commas; all by default.")] = "",
    questions: Annotated[Path | None, typer.Option(help="JSONL with turns, messages or prompt in each line.")] = None,
    max_new_tokens: TokensOption = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt.")] = 3,
    dtype: Annotated[str, typer.Option(help="Number format of the weights: float32, bfloat16 or float16.")] = "float32",
    quick: QuickOption = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare methods with plain generate: equality first, then speed where tokens are equal."""
    from specdec.bench.methods import known
    from specdec.bench.report import machine, overhead, results
    from specdec.bench.workloads import first_of_each

    with _told(ValueError, OSError):
        names = [known(name) for name in _split(methods)]
        prompts = _prompts(_split(workloads), questions)
    target, tokenizer = _load(model, dtype)
    if quick:
        prompts, max_new_tokens, repeats = first_of_each(prompts, 1), min(max_new_tokens, 32), 1
    comparison = _compare(target, tokenizer, prompts, names, max_new_tokens, repeats)
    with notes.status("measuring what a step costs beside the target's pass"):
        beside = overhead(target, first_of_each(comparison.asks, 1)[:3], max_new_tokens)
    report = {
        "machine": machine(target, model),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "results": results(comparison),
        "differences": [str(difference) for difference in comparison.differences],
        "overhead": beside,
    }
    if json_path:
        with _told(OSError):
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    _show(comparison)
    output.print(f"beside each pass of {beside['pass_ms']} ms: {beside['outside_ms']} ms (recycling at 64 nodes)")


@app.command()
def demo(
    path: Annotated[bool, typer.Option("--path", help="Only make the model ready and print its directory.")] = False,
    quick: QuickOption = False,
) -> None:
    """Show on a real model and eight kinds of work that the tokens are the same, and how much faster they come."""
    if path:
        typer.echo(_resolve("demo"))
        return
    from specdec.bench.workloads import first_of_each, own

    target, tokenizer = _load("demo")
    prompts = first_of_each(own(), 1 if quick else 2)
    comparison = _compare(target, tokenizer, prompts, ["auto"], 32 if quick else 64, 1)
    _show(comparison)
    raise typer.Exit(1 if comparison.differences else 0)


@contextmanager
def _told(*errors: type[Exception]) -> Iterator[None]:
    """Turn the user's errors into a plain message and exit status 1."""
    try:
        yield
    except errors as error:
        notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _resolve(model: str) -> str:
    from specdec.demo import DemoError, resolve

    with _told(DemoError), notes.status("making the model ready"):
        return resolve(model)


def _load(model: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The model, on a GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = _resolve(model)
    with _told(OSError, ValueError), notes.status(f"loading {model}"):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {dtype}: give float32, bfloat16 or float16")
        target = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(where)
    if target.generation_config.pad_token_id is None:  # else every generate says that it pads with the end token
        target.generation_config.pad_token_id = tokenizer.eos_token_id
    return target.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool | None) -> list[int]:
    from specdec.bench.workloads import Prompt, encode

    if chat and not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; leave --chat out")
    if tokenizer.chat_template and chat is not False:
        return encode(tokenizer, Prompt("", ({"role": "user", "content": prompt},)))
    return list(tokenizer(prompt)["input_ids"])


def _pace(tokens: int, passes: int | None, seconds: float) -> str:
    how = f" in {passes} passes ({tokens / max(passes, 1):.2f} a pass)" if passes else ""
    return f"{tokens} tokens{how}, {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


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

    with Progress(console=notes, transient=True) as progress:
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
    Console(width=max(output.width, WIDTH)).print(table)
    for difference in comparison.differences:
        output.print(f"differs: {difference}", style="red", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
