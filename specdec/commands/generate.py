"""``specdec generate``: one answer, in the colours of its drafters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from specdec.commands import console
from specdec.commands.options import ModelOption, TokensOption


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer.")],
    model: ModelOption = "demo",
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default where there is one.")] = None,
    drafter: Annotated[str, typer.Option(help="Any name that wrap knows, or none for plain generate.")] = "auto",
    max_new_tokens: TokensOption = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="The text alone: no colours, no figures.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Add every step to this file; see specdec show.")] = None,
) -> None:
    """Answer a prompt, each token in the colour of the drafter that guessed it."""
    import torch

    import specdec
    from specdec.printer import Printer
    from specdec.recorder import Recorder

    target, tokenizer = console.load(model)
    with console.told(ValueError, OSError):
        if trace and drafter == "none":
            raise ValueError("--trace records drafts; give a --drafter other than none")
        recorder = Recorder(trace, prompt, tokenizer) if trace else None
        ids = torch.tensor([_prompt_ids(tokenizer, prompt, chat)], device=target.device)
        stats = None if drafter == "none" else specdec.stats(specdec.wrap(target, drafter=drafter, trace=recorder))
    printer = Printer(Console(color_system=None) if plain else console.output, tokenizer, stats)
    draw = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    start = time.perf_counter()
    target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=printer, **draw)
    if not plain:
        seconds = time.perf_counter() - start
        console.notes.print(printer.legend())
        console.notes.print(_pace(printer.shares.total(), stats.steps if stats else None, seconds))


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
