"""``specdec show``: a trace in the terminal, or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from specdec.commands import console

KEY = "✓ accepted   + the target's own choice   ○ what else the target wanted   drafter's, then target's probability"

if TYPE_CHECKING:
    from specdec.printer import Palette
    from specdec.trace import Generation, Step, Trace


def show(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="What wrap(model, trace=...) or --trace recorded.")],
    generation: Annotated[int | None, typer.Option(help="Its number; may be left out where there is one.")] = None,
    step: Annotated[int | None, typer.Option(help="Draw the tree of this step, from 0, the prompt's own pass.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A directory or hub id, where the trace has no texts.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead, to be opened in a browser.")] = None,
) -> None:
    """Show what was guessed, by whom, and what came of it: all generations, one of them, or one of its steps."""
    from specdec.trace import read_trace

    words = console.load_tokenizer(tokenizer) if tokenizer else None
    with console.told(ValueError, OSError):
        trace = read_trace(path)
        trace = trace.with_texts(words) if words else trace
        chosen = _chosen(trace, generation, step)
        if html:
            from specdec.page.page import write_page

            write_page(html, trace=trace)
        elif chosen is None:
            console.show(_generations(trace))
        elif step is None:
            _summary(trace, chosen)
        else:
            _step(trace, chosen, step)


def _chosen(trace: Trace, number: int | None, step: int | None) -> Generation | None:
    """The generation that was asked for; None where there are several and none was."""
    known = {generation.id: generation for generation in trace.generations}
    if not known:
        raise ValueError("no generation has been recorded in it")
    if number is None and len(known) > 1:
        if step is not None:
            raise ValueError(f"--step needs --generation: there are {len(known)}")
        return None
    if number is not None and number not in known:
        raise ValueError(f"--generation {number}: the trace has {', '.join(map(str, known))}")
    generation = known[number] if number is not None else trace.generations[0]
    if step is not None and not 0 <= step < len(generation.steps):
        raise ValueError(f"--step {step}: generation {generation.id} has the steps 0 to {len(generation.steps) - 1}")
    return generation


def _generations(trace: Trace) -> Table:
    from specdec.tree_view import harmless

    table = Table("generation", "label", "drafter", "rows", "tokens", "steps", "per step", "time", box=None)
    for each in trace.generations:
        tokens = sum(len(step.committed) for step in each.steps)
        pace = f"{tokens / max(len(each.steps), 1):.2f}"
        counts = (str(len(each.prompts)), str(tokens), str(len(each.steps)), pace)
        table.add_row(str(each.id), Text(harmless(each.label[:40], "")), Text(each.drafter), *counts, _seconds(each))
    return table


def _seconds(generation: Generation) -> str:
    return "cut short" if generation.seconds is None else f"{generation.seconds:.2f} s"


def _summary(trace: Trace, generation: Generation) -> None:
    """Each row's text in its drafters' colours, then its steps, one a line."""
    from specdec.tree_view import harmless

    palette = _palette(generation)
    about = (generation.drafter, generation.policy, generation.verifier, generation.level, _seconds(generation))
    if generation.label:
        console.output.print(Text(harmless(generation.label), "bold"))
    console.output.print(" · ".join(about), style="dim", highlight=False, markup=False)
    for row in range(len(generation.prompts)):
        if len(generation.prompts) > 1:
            console.output.print(Text(f"\nrow {row}", "bold"))
        pieces = trace.pieces(generation.output(row))
        drafters = [drafter for step in generation.of_row(row) for drafter in step.guessed_by]
        colours = map(palette.style, drafters)
        console.output.print(Text.assemble(*zip(map(harmless, pieces), colours, strict=True)), soft_wrap=True)
        console.show(_steps(generation, row, pieces, palette))
    console.output.print(palette.legend())


def _palette(generation: Generation) -> Palette:
    """The colours that each drafter of a generation has, those first whose guesses came true first."""
    from specdec.printer import Palette

    palette = Palette()
    for step in generation.steps:
        palette.shares.update(step.guessed_by)
    for drafter in [*palette.shares, *(drafter for step in generation.steps for drafter in step.source)]:
        palette.style(drafter)
    return palette


def _steps(generation: Generation, row: int, pieces: list[str], palette: Palette) -> Table:
    table = Table("step", "drafted", "accepted", "draft ms", "pass ms", "text", box=None)
    for column in table.columns[:-1]:
        column.justify = "right"
    done = 0
    for number, step in enumerate(generation.steps):
        if step.row == row:
            texts = pieces[done : (done := done + len(step.committed))]
            table.add_row(str(number), *_figures(step), _coloured(texts, step, palette))
    return table


def _figures(step: Step) -> tuple[str, ...]:
    times = (f"{1000 * step.seconds[part]:.1f}" for part in ("draft", "verify"))
    return (str(len(step.tokens) - 1), str(len(step.path) - 1), *times)


def _coloured(texts: list[str], step: Step, palette: Palette) -> Text:
    from specdec.tree_view import printable

    return Text("·").join(
        Text(printable(text), palette.style(drafter)) for text, drafter in zip(texts, step.guessed_by, strict=True)
    )


def _step(trace: Trace, generation: Generation, number: int) -> None:
    from specdec.tree_view import draw

    step, palette = generation.steps[number], _palette(generation)
    times = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in step.seconds.items())
    row = f" of row {step.row}" if len(generation.prompts) > 1 else ""
    counts = f"{len(step.tokens) - 1} drafted, {len(step.path) - 1} accepted"
    console.output.print(f"step {number}{row}: {counts}; {times}", highlight=False, soft_wrap=True)
    console.output.print(draw(step, trace.text, palette.style), soft_wrap=True)
    console.output.print(KEY, style="dim", soft_wrap=True)
    console.output.print(palette.legend())
