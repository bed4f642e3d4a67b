"""The server's routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

import specdec
from specdec.memory import Memory
from specdec.server import errors, metrics
from specdec.server.errors import ApiError
from specdec.server.forms import ChatForm, TextForm
from specdec.server.gate import Gate
from specdec.server.replies import reply
from specdec.server.schema import ChatRequest, CompletionRequest, ErrorBody
from specdec.server.service import Service
from specdec.server.tenants import Tenants

log = logging.getLogger("uvicorn.error")


def app(
    service: Service,
    tokens: Sequence[str] = (),
    memory: Memory | None = None,
    save_to: Path | None = None,
    max_body_bytes: int = 1 << 20,
    body_seconds: float = 30.0,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """An ASGI application in OpenAI's manner; docs/server.md says what it takes.

    When it ends, the pool is closed, and the memory saved. The model's operations are documented at ``/openapi.json``.

    Args:
        service: answers.
        tokens: of tenants; none for one tenant without a token.
        memory: what the pool learns, for its size, and to be saved.
        save_to: where to; None to save nothing.
        max_body_bytes, body_seconds: of a request's body.
        stopping: whether the server is shutting down.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.pool.close)
        if memory is not None and save_to is not None:
            await asyncio.to_thread(memory.save, save_to)
            log.info("memory saved in %s", save_to)

    made = FastAPI(title="specdec", version=specdec.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    made.add_middleware(
        Gate, tenants=Tenants(tokens), most_bytes=max_body_bytes, seconds=body_seconds, stopping=stopping
    )
    _say_errors(made)
    _add_completions(made, service)
    _add_facts(made, service, memory)
    document = made.openapi
    made.openapi = lambda: _promised(document())  # type: ignore[method-assign]
    return made


BEARER = Depends(HTTPBearer(auto_error=False))
PROMISED: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": ErrorBody} for status, meaning in errors.MEANINGS.items()
}
EITHER: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
GATED: dict[int | str, dict[str, Any]] = {status: PROMISED[status] for status in (401, 408, 413, 503)}


def _add_completions(made: FastAPI, service: Service) -> None:
    options: dict[str, Any] = {"responses": {**PROMISED, **EITHER}, "dependencies": [BEARER]}

    @made.post("/v1/chat/completions", **options)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """The assistant's next message."""
        writing = await service.chat(asked, request.state.token)
        return await reply(request, asked, writing, ChatForm(), service.name)

    @made.post("/v1/completions", **options)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """How a text, or each of several, goes on."""
        writing = await service.complete(asked, request.state.token)
        return await reply(request, asked, writing, TextForm(), service.name)


def _add_facts(made: FastAPI, service: Service, memory: Memory | None) -> None:
    created = int(time.time())

    model = {"id": service.name, "object": "model", "created": created, "owned_by": "specdec"}

    @made.get("/v1/models", responses=GATED, dependencies=[BEARER])
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model]}

    @made.get("/v1/models/{name:path}", responses={**GATED, 404: PROMISED[404]}, dependencies=[BEARER])
    async def find(name: str) -> dict[str, Any]:
        """The model of that name."""
        service.check_name(name)
        return model

    @made.get("/metrics", responses=GATED, dependencies=[BEARER], response_class=PlainTextResponse)
    async def counts() -> str:
        """Counts of tokens, guesses and requests, in Prometheus' text format."""
        return metrics.exposition(service.pool, memory)

    @made.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server is up."""
        return {"status": "ok"}


def _say_errors(made: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @made.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return error.response()

    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return errors.of_validation(error).response()

    @made.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return errors.of_http(error).response()

    @made.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # which nobody reads

    @made.exception_handler(Exception)
    async def ours_to_mend(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says how", "internal_error").response()


def _promised(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI without FastAPI's own form of validation errors, which are answered with 400 here."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document
