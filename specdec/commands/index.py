"""``specdec index``: a corpus made ready for retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import console

index = typer.Typer(no_args_is_help=True, help="Make a corpus ready for the retrieval drafter.")


@index.callback()
def main() -> None:
    """A group, though it has one command yet."""


@index.command()
def build(
    corpus: Annotated[list[Path], typer.Argument(help="Text files, and JSONL files with a document in each line.")],
    tokenizer: Annotated[str, typer.Option(help="A directory or hub id: the target's tokenizer.")],
    out: Annotated[Path, typer.Option(help="The directory to make.")],
) -> None:
    """Index a corpus, so that what followed any text in it is found at once."""
    from specdec.drafters.corpus import build

    words = console.load_tokenizer(tokenizer)
    with console.told(ValueError, OSError, ImportError), console.notes.status("reading") as status:
        made = build(corpus, out, words, lambda stage, tokens: status.update(f"{stage}: {tokens} tokens"))
    console.output.print(f"{out}: {made.documents} documents, {len(made.suffixes)} tokens", highlight=False)
