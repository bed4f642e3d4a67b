"""The command line, ``specdec``: each command has a file in ``commands``.

Heavy imports stand inside the commands, so that ``specdec --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from specdec.commands import console
from specdec.commands.bench import bench, demo
from specdec.commands.compare import compare
from specdec.commands.generate import generate
from specdec.commands.index import index
from specdec.commands.replay import replay
from specdec.commands.serve import serve
from specdec.commands.show import show
from specdec.commands.train import train
from specdec.commands.train_head import head

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from specdec import __version__

        console.output.print(f"specdec {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Speculative decoding that makes model.generate faster and changes nothing else."""


for command in (generate, serve, bench, show, compare, replay, demo):
    app.command()(command)
app.add_typer(index, name="index")
train.command()(head)
app.add_typer(train, name="train")

if __name__ == "__main__":
    app()
