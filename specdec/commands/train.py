"""``specdec train``: drafters made for one target, from what it writes after the user's prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import console
from specdec.commands.options import ModelOption

if TYPE_CHECKING:
    import torch

    from specdec.training.samples import Sample

train = typer.Typer(no_args_is_help=True, help="Make a drafter for a target, from the target's own outputs.")

PromptsOption = Annotated[
    list[Path], typer.Option(help="Prompts to learn from, as `bench --questions` takes them. May be given again.")
]
OutOption = Annotated[Path, typer.Option(help="The directory to make; the same command goes on with what it holds.")]
SamplesOption = Annotated[
    Path | None, typer.Option(help="Where what the target writes is kept; several drafts may share it.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
TextsOption = Annotated[int, typer.Option(min=0, help="Prompts to write after, drawn from all; 0 for all.")]
HeldOption = Annotated[int, typer.Option(min=1, help="Prompts held out, for the figure that is told as it goes.")]
WrittenOption = Annotated[int, typer.Option(min=8, help="Tokens that the target writes after a prompt at most.")]
LongestOption = Annotated[int, typer.Option(min=2, help="Prompts of more tokens are left out.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="That the target writes at.")]
WritingOption = Annotated[float, typer.Option(min=0.0, help="After which the target writes no more; 0: until done.")]
DtypeOption = Annotated[str, typer.Option(help="Number format that the target writes in.")]
WIDE = 32  # texts that the target writes together


class Kind(StrEnum):
    """What a draft is."""

    layers = "layers"
    feature = "feature"
    longspec = "longspec"


@train.callback()
def main() -> None:
    """A group: a draft, or what judges one."""


@train.command()
def draft(
    prompts: PromptsOption,
    out: OutOption,
    model: ModelOption = "demo",
    kind: Annotated[
        Kind,
        typer.Option(help="A few layers of the target; or one, that reads its features, or its KV rows."),
    ] = Kind.layers,
    layers: Annotated[int, typer.Option(min=1, help="How many layers a draft of kind 'layers' has.")] = 2,
    vocabulary: Annotated[int, typer.Option(min=0, help="Tokens that its head keeps, the likeliest; 0: all.")] = 8192,
    minutes: Annotated[float, typer.Option(min=0.0, help="Of training at most.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Of training at most.")] = 10_000,
    window: Annotated[int, typer.Option(min=1, help="For 'longspec': newest tokens whose own rows it holds.")] = 128,
    offsets: Annotated[bool, typer.Option(help="For 'longspec': learn positions beyond the texts' length too.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The highest.")] = 1e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Train with products in bfloat16.")] = False,
    samples: SamplesOption = None,
    texts: TextsOption = 0,
    held_out: HeldOption = 24,
    max_new_tokens: WrittenOption = 256,
    longest: LongestOption = 1024,
    temperature: TemperatureOption = 0.6,
    writing_minutes: WritingOption = 0.0,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Distil a small drafter: ``out/draft.safetensors``, to be used as --drafter draft:OUT/draft.safetensors.

    Of kind 'longspec' it is ``out/longspec.safetensors``, to be used as --drafter longspec:OUT/longspec.safetensors.
    The target writes first, which is kept; then its draft learns to say what it said. Stopped with Ctrl-C, the same
    command goes on.
    """
    asked = (texts, held_out, max_new_tokens, longest, temperature, writing_minutes, seed)
    written, held = write(model, prompts, samples or out / "samples", dtype, *asked)
    target, _ = console.load(model)
    target.requires_grad_(False)
    limits = (steps, minutes, batch, learning_rate, every, bfloat16, seed)
    with console.told(ValueError, OSError):
        if kind is Kind.longspec:
            _longspec(target, window, offsets, vocabulary, written, held, out, *limits)
        else:
            _distil(target, kind, layers, vocabulary, written, held, out, *limits)
    name = "longspec" if kind is Kind.longspec else "draft"
    path = out / f"{name}.safetensors"
    console.output.print(f"{path}: use it as --drafter {name}:{path}", soft_wrap=True, highlight=False)


def write(
    model: str,
    files: Sequence[Path],
    folder: Path,
    dtype: str,
    texts: int,
    held_out: int,
    max_new_tokens: int,
    longest: int,
    temperature: float,
    minutes: float,
    seed: int,
) -> tuple[list[Sample], list[Sample]]:
    """What the target writes after prompts, and, greedily, after those held out; what was written before is read."""
    import numpy as np
    from rich.progress import Progress

    from specdec.bench.workloads import encode, read
    from specdec.training.samples import collect

    target, tokenizer = console.load(model, dtype)
    with console.told(ValueError, OSError):
        ids = [encode(tokenizer, prompt) for file in files for prompt in read(file)]
        ids = [each for each in ids if 1 < len(each) <= longest]
        if len(ids) <= held_out:
            raise ValueError(f"{len(ids)} prompts of 2 to {longest} tokens: give more than are held out, {held_out}")
        ids = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
        ids = ids[: held_out + texts] if texts else ids
        with Progress(console=console.notes, transient=True) as progress:
            bar = progress.add_task("writing", total=len(ids))

            def tell(tokens: int, done: int) -> None:
                progress.update(bar, description=f"writing: {tokens} tokens", completed=done)

            def written(chosen: list[list[int]], name: str, heat: float) -> list[Sample]:
                settings = (max_new_tokens, heat, seed, WIDE, True, minutes or math.inf, tell)
                return collect(target, chosen, folder / name, *settings)

            held = written(ids[:held_out], "held-out", 0.0)
            return written(ids[held_out:], "written", temperature), held


def _longspec(
    target: Any,
    window: int,
    offsets: bool,
    vocabulary: int,
    written: list[Sample],
    held: list[Sample],
    out: Path,
    steps: int,
    minutes: float,
    batch: int,
    learning_rate: float,
    every: int,
    bfloat16: bool,
    seed: int,
) -> None:
    """Train a layer that reads the target's rows, and save it."""
    from specdec.training import longspec

    longspec.train(
        target,
        written,
        held,
        out,
        steps,
        minutes or math.inf,
        learning_rate,
        seed,
        batch,
        window,
        vocabulary=vocabulary or None,
        offsets=offsets,
        every=every,
        bfloat16=bfloat16,
    )


def _distil(
    target: Any,
    kind: Kind,
    layers: int,
    vocabulary: int,
    written: list[Sample],
    held: list[Sample],
    out: Path,
    steps: int,
    minutes: float,
    batch: int,
    learning_rate: float,
    every: int,
    bfloat16: bool,
    seed: int,
) -> None:
    """Train a draft and save it."""
    import os

    import torch

    from specdec.drafters import distilled
    from specdec.training import feature, loop
    from specdec.training import layers as stack
    from specdec.training.samples import shuffled

    total = target.config.get_text_config(decoder=True).num_hidden_layers
    numbers = stack.evenly(layers, total) if kind is Kind.layers else [total - 1]
    how: Any = stack if kind is Kind.layers else feature
    written, held = how.usable(written), how.usable(held)
    kept = stack.most_frequent(written, vocabulary) if vocabulary else None
    draft = distilled.distilled(target, numbers, kept, fused=kind is Kind.feature)

    def loss(texts: list[Sample]) -> torch.Tensor:
        with torch.autocast(draft.device.type, torch.bfloat16, enabled=bfloat16):
            return how.loss(draft, texts)  # type: ignore[no-any-return]

    state = loop.train(
        draft,
        shuffled(written, batch, seed),
        loss,
        out,
        steps,
        learning_rate,
        seed,
        minutes or math.inf,
        lambda: how.validate(draft, held),
        every,
    )
    told = {"kind": kind.value, "figures": state.figures, "seconds": state.seconds, "cpu_seconds": sum(os.times()[:2])}
    told |= {"texts": len(written), "tokens": sum(len(sample.written) for sample in written), "batch": batch}
    distilled.save(out / "draft.safetensors", target, draft, numbers, told)
