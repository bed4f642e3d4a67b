"""``specdec serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import ipaddress
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import console


def serve(
    model: Annotated[str, typer.Argument(help="A directory or hub id; 'demo' is SmolLM2-135M-Instruct.")],
    host: Annotated[str, typer.Option(help="Where to listen; other machines only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        list[str] | None, typer.Option(envvar="SPECDEC_TOKEN", help="A tenant's bearer token; may be given again.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model; by default MODEL.")] = None,
    memory: Annotated[Path | None, typer.Option(help="What drafters learn: loaded at first, saved at the end.")] = None,
    memory_mb: Annotated[int, typer.Option(min=1, help="Of memory, at most.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_rows: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    max_cache_mb: Annotated[int | None, typer.Option(min=1, help="Of KV rows, at most.")] = None,
    max_kept_mb: Annotated[int, typer.Option(min=0, help="Of KV rows kept for later prompts, at most.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 4096,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of one prompt.")] = 32768,
    max_choices: Annotated[int, typer.Option(min=1, help="Answers to one request.")] = 8,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of a request's body.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of a request, waiting among them.")] = 600.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that requests may go on when the server stops.")] = 60,
) -> None:
    """Serve a model in OpenAI's manner: chats, completions, streaming, tools; see docs/server.md."""
    with console.told(ValueError, OSError):
        _check(host, token or [])
    target, tokenizer = console.load(model, dtype)

    import uvicorn

    from specdec.memory import Memory
    from specdec.pool import SessionPool
    from specdec.server.app import app
    from specdec.server.predictions import Predictions
    from specdec.server.service import Service

    learnt, predictions = Memory(memory_mb << 20), Predictions()
    cache = max_cache_mb << 20 if max_cache_mb else None
    with console.told(ValueError, OSError):
        if memory is not None and memory.exists():
            learnt.load(memory)
        pool = SessionPool(
            target,
            tokenizer,
            predictions,
            memory=learnt,
            max_rows=max_rows,
            max_waiting=max_waiting,
            max_cache_bytes=cache,
            max_kept_bytes=max_kept_mb << 20,
        )
        service = Service(
            target, pool, predictions, name or model, max_new_tokens, max_prompt_tokens, max_choices, timeout
        )
    with console.notes.status("warming up"):
        pool.generate("Hello", max_new_tokens=4)
    made = app(service, token or [], learnt, memory, max_body_mb << 20, stopping=lambda: server.should_exit)
    config = uvicorn.Config(made, host, port, timeout_graceful_shutdown=drain)
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # which is raised again when all has been put in order
        server.run()


def _check(host: str, tokens: list[str]) -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {' and '.join(missing)}: pip install 'specdec-runtime[serve]'")
    from specdec.server.tenants import Tenants

    if not Tenants(tokens).tokens and not _is_here(host):
        raise ValueError(f"--host {host} can be reached from elsewhere: give a --token, or set SPECDEC_TOKEN")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
