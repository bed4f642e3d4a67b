"""What is asked of every request before anybody looks into it: a token, a body of a fair size in a fair time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.server.errors import ApiError
from specdec.server.tenants import Tenants

OPEN = ("/health", "/openapi.json")


class Gate:
    """ASGI middleware that lets a request in with its whole body read, or answers it with an error.

    Args:
        app: what is behind it. It finds the token in ``scope["state"]["token"]``.
        tenants: who may come in.
        most_bytes: of a body.
        seconds: in which a body must have come.
        stopping: whether the server is shutting down.
    """

    def __init__(
        self, app: ASGIApp, tenants: Tenants, most_bytes: int, seconds: float, stopping: Callable[[], bool]
    ) -> None:
        self.app, self.tenants, self.most_bytes, self.seconds = app, tenants, most_bytes, seconds
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await self._admitted(scope, receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        except ClientDisconnect:
            return None
        return await self.app(scope, _again(body, receive), send)

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises ApiError; a body that is refused is read all the same, or the client could not hear why."""
        refusal = self._refusal(scope)
        try:
            async with asyncio.timeout(self.seconds):
                body = await _read(receive, 0 if refusal else self.most_bytes)
        except TimeoutError:
            raise refusal or ApiError(408, f"no whole body within {self.seconds} seconds", "body_too_slow") from None
        if refusal is not None:
            raise refusal
        if body is None:
            raise ApiError(413, f"a body has {self.most_bytes} bytes at most", "body_too_large")
        return body

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN:
            return None
        if self.stopping():
            return ApiError(503, "the server is shutting down", "shutting_down")
        headers = dict(scope["headers"])
        token = self.tenants.find(headers.get(b"authorization", b""))
        if token is None:
            return ApiError(
                401,
                "give a valid token: Authorization: Bearer TOKEN",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["token"] = token
        return None


async def _read(receive: Receive, most: int) -> bytes | None:
    """A body; None if it is larger than ``most`` bytes, which are all that is held. Raises ClientDisconnect."""
    body, size, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size, more = size + len(part), message.get("more_body", False)
        if size <= most:
            body += part
    return bytes(body) if size <= most else None


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def once_more() -> Message:
        return first.pop() if first else await receive()

    return once_more
