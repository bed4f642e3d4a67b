"""From answers that are being written to responses, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from specdec.server.choice import Piece
from specdec.server.errors import ApiError, Json
from specdec.server.forms import Form
from specdec.server.schema import Asked
from specdec.server.writing import Writing

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = "data: [DONE]\n\n"
log = logging.getLogger("uvicorn.error")


async def reply(request: Request, asked: Asked, writing: Writing, form: Form, model: str) -> Response:
    """The response; ``writing`` is closed with it. Raises ApiError, and ClientDisconnect where nobody waits."""
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    if not asked.stream:
        try:
            return Json(await unless_gone(request, whole(writing, form, head)))
        finally:
            writing.close()
    events = stream(writing, form, head, bool(asked.stream_options and asked.stream_options.include_usage))
    try:
        first = await unless_gone(request, _next(events))  # until then an error may have a status of its own
    except BaseException:
        writing.close()
        raise
    return Events(first, events, writing)


async def whole(writing: Writing, form: Form, head: dict[str, Any]) -> dict[str, Any]:
    """The body of a response that comes at once."""
    pieces = [Piece() for _ in writing.choices]
    async for i, piece in writing.pieces():
        pieces[i] += piece
    choices = [form.choice(i, piece) for i, piece in enumerate(pieces)]
    return {**head, "object": form.whole, "choices": choices, "usage": writing.usage()}


async def stream(writing: Writing, form: Form, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one for each piece of an answer."""
    usage = {"usage": None} if with_usage else {}

    def event(*choices: dict[str, Any], **more: Any) -> str:
        chunk = {**head, "object": form.chunk, "choices": choices, **usage, **more}
        return f"data: {json.dumps(chunk, allow_nan=False)}\n\n"

    begun = set[int]()
    async for i, piece in writing.pieces():
        if i not in begun and (opening := form.opening(i)):
            yield event(opening)
        begun.add(i)
        yield event(form.delta(i, piece))
    if with_usage:
        yield event(usage=writing.usage())
    yield DONE


class Events(StreamingResponse):
    """A stream of events that gives up what is written when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncIterator[str], writing: Writing) -> None:
        super().__init__(_all(first, events), headers=HEADERS)
        self._writing = writing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._writing.close()


async def _all(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events; an error on the way is the last one."""
    yield first
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    except Exception:
        log.exception("a stream failed")
        yield f"data: {json.dumps(ApiError(500, 'the server failed', 'internal_error').body)}\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work returns, given up as soon as the client has gone. Raises ClientDisconnect then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _next(events: AsyncIterator[str]) -> str:
    return await anext(events)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
