"""How an answer leaves: as one JSON object or as server-sent events, and never for a client that has left."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from kvfold.server.http_errors import APIError, error_body

T = TypeVar("T")
KEEP_ALIVE = 15.0  # seconds of silence after which a comment keeps proxies from closing a stream


class ClientLeft(Exception):
    """The client closed the connection; there is nobody to answer."""


async def unless_left(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves. Raises ClientLeft then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def answer_whole(http: Request, work: Awaitable[dict[str, Any]]) -> Response:
    """The JSON object that `work` makes."""
    try:
        return JSONResponse(await unless_left(http, work))
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it; the log does


async def answer_stream(http: Request, chunks: AsyncGenerator[dict[str, Any], None]) -> Response:
    """Chunks as server-sent events. What fails before the first one is an ordinary error response."""
    try:
        first = await unless_left(http, anext(chunks))
    except ClientLeft:
        await chunks.aclose()
        return Response(status_code=499)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _EventStream(_events(first, chunks), headers)


class _EventStream(StreamingResponse):
    """Closes its events when the client leaves in the middle of one: the request is cancelled then, not some day."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    following: asyncio.Future[dict[str, Any]] | None = None
    try:
        yield _event(first)
        while True:
            following = following or asyncio.ensure_future(_next(chunks))
            await asyncio.wait([following], timeout=KEEP_ALIVE)
            if not following.done():
                yield b": keep-alive\n\n"
                continue
            chunk, following = following.result(), None
            if not chunk:
                break
            yield _event(chunk)
    except APIError as error:
        yield _event(error.body)
    except Exception:
        yield _event(error_body(500, "the server failed; its log says why"))
        raise
    else:
        yield b"data: [DONE]\n\n"
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    """The next chunk, {} after the last: StopAsyncIteration cannot be the result of a future."""
    return await anext(chunks, {})


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode(errors="replace")


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
