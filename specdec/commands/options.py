"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="A directory or hub id; 'demo' is SmolLM2-135M-Instruct.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A few kinds, one prompt of each, few tokens, one repeat.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
