"""What all commands share: where they print, how they tell a user's mistake, and how they load a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

output, notes = Console(), Console(stderr=True)
WIDTH = 100  # of tables, at least: in a file too, no column may be cut


@contextmanager
def told(*errors: type[Exception]) -> Iterator[None]:
    """Turn the user's errors into a plain message and exit status 1."""
    try:
        yield
    except errors as error:
        notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def split(names: str) -> list[str]:
    """The names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def show(table: Table) -> None:
    """Print a table in full."""
    Console(width=max(output.width, WIDTH)).print(table)


def resolve(model: str) -> str:
    """The directory or hub id of a model; the demo model is made ready first."""
    from specdec import demo

    with told(demo.DemoError), notes.status("making the model ready"):
        return demo.resolve(model)


def load(model: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The model, on a GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = resolve(model)
    with told(OSError, ValueError), notes.status(f"loading {model}"):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {dtype}: give float32, bfloat16 or float16")
        target = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(where)
    if target.generation_config.pad_token_id is None:  # else every generate says that it pads with the end token
        target.generation_config.pad_token_id = tokenizer.eos_token_id
    return target.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, or of a directory that holds nothing else."""
    from transformers import AutoTokenizer

    where = resolve(model)
    with told(OSError, ValueError):
        return AutoTokenizer.from_pretrained(where)
