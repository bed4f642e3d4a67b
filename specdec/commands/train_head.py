"""``specdec train head``: what judges a drafter's guesses while it makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.commands import console
from specdec.commands.options import ModelOption
from specdec.commands.train import (
    DtypeOption,
    HeldOption,
    LongestOption,
    OutOption,
    PromptsOption,
    SamplesOption,
    SeedOption,
    TemperatureOption,
    TextsOption,
    WrittenOption,
    write,
)


def head(
    prompts: PromptsOption,
    out: OutOption,
    draft: Annotated[str, typer.Option(help="The drafter to judge: a draft.safetensors, or a smaller model.")],
    model: ModelOption = "demo",
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 2000,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The highest.")] = 1e-3,
    rejection: Annotated[float, typer.Option(min=0.0, help="What a rejection weighs, an acceptance being 1.")] = 6.0,
    mixing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the target's tokens among guesses.")] = 0.15,
    guess_at: Annotated[float, typer.Option(min=-1.0, help="Temperature of guesses; -1: that of the text.")] = -1.0,
    samples: SamplesOption = None,
    texts: TextsOption = 0,
    held_out: HeldOption = 24,
    max_new_tokens: WrittenOption = 256,
    longest: LongestOption = 1024,
    temperature: TemperatureOption = 0.6,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Train SpecDec++'s acceptance head for a drafter: ``out/head.safetensors``, for SmallModelDrafter(head=...).

    It learns from what the target writes how likely that accepts a guess, where both speak at one temperature.
    """
    from specdec.training.head import guessed, train_head

    asked = (texts, held_out, max_new_tokens, longest, temperature, 0.0, seed)
    written, held = write(model, prompts, samples or out / "samples", dtype, *asked)
    target, _ = console.load(model)
    path, at = out / "head.safetensors", temperature if guess_at < 0 else guess_at
    with console.told(ValueError, OSError):
        drafting = drafting_model(draft, target)
        with console.notes.status("reading what the target wrote"):
            examples, others = (guessed(target, drafting, each, at, mixing, seed) for each in (written, held))
        trained = train_head(examples, others, out, steps, blocks, rejection, learning_rate, seed)
        trained.save(path, draft=draft, temperature=at, rejection=rejection, mixing=mixing)
    console.output.print(f"{path}: use it as SmallModelDrafter(draft, head='{path}')", soft_wrap=True, highlight=False)


def drafting_model(draft: str, target: Any) -> Any:
    """The model that drafts: of a draft's file, which is made of the target, or of its own.

    Raises:
        ValueError: a draft that is for another target, or that an acceptance head cannot judge.
    """
    if not Path(draft).is_file():
        return console.load(draft)[0]
    from specdec.drafters import distilled

    model = distilled.load(Path(draft), target)
    if hasattr(model, "fuse"):
        raise ValueError(f"{draft} reads the target's features: an acceptance head judges drafts of kind layers")
    return model
