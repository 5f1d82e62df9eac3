"""What the server refuses to take on: too long a queue, too large or too slow a body, the wrong key."""

import asyncio
import base64
import binascii
import hmac
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvfold.server.http_errors import APIError, error_body

OPEN_PATHS = ("/health",)
DISCARD = 16  # times the limit, beyond which a body is not even read to its end
RETRY_SECONDS = 60  # the longest that a client is told to wait


class Queue:
    """Requests that have no token yet. A full queue answers 429 and when to come back."""

    def __init__(self, most_requests: int, most_tokens: int | None) -> None:
        self.requests = 0
        self.tokens = 0  # of their prompts
        self._most_requests = most_requests
        self._most_tokens = most_tokens

    def check(self, rate: float, requests: int = 1, tokens: int = 0) -> None:
        """Raises APIError (429) where so many more have no room. rate: prompt tokens per second of late."""
        over = self._most_tokens is not None and self.tokens + tokens > self._most_tokens
        if self.requests and (over or self.requests + requests > self._most_requests):
            seconds = min(RETRY_SECONDS, max(1, math.ceil(self.tokens / rate))) if rate > 0 else 1
            raise APIError(
                429,
                f"{self.requests} requests with {self.tokens} prompt tokens are waiting; try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    @contextmanager
    def places(self, tokens: Sequence[int], rate: float) -> Iterator[list["Place"]]:
        """A place for each of a request's prompts, of so many tokens, until it is left. All or none get one; what is
        too much even for an empty queue gets its places there, as it would never else. rate: prompt tokens per
        second of late."""
        self.check(rate, len(tokens), sum(tokens))
        places = [Place(self, count) for count in tokens]
        try:
            yield places
        finally:
            for place in places:
                place.leave()


class Place:
    """One request in the queue."""

    def __init__(self, queue: Queue, tokens: int) -> None:
        self._queue: Queue | None = queue
        self._tokens = tokens
        queue.requests += 1
        queue.tokens += tokens

    def leave(self) -> None:
        """The request has its first token, or has ended; once is enough."""
        if self._queue is not None:
            self._queue.requests -= 1
            self._queue.tokens -= self._tokens
            self._queue = None


class BodyLimit:
    """ASGI middleware that has read a whole body before the application sees it: 413 for one of more than
    `most_bytes`, 408 for one that takes longer than `seconds`."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except ConnectionResetError:
            return  # nobody waits for an answer
        except TimeoutError:
            await _refuse(scope, receive, send, 408, f"the body did not arrive within {self._seconds:g} s")
            return
        if body is None:
            await _refuse(scope, receive, send, 413, f"the body has more than {self._most_bytes} bytes; send less")
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None for one that is too large. What little more of that comes is read and thrown away: most
        clients look for the answer only when they have sent everything."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > DISCARD * self._most_bytes:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left before its body was complete")
            part = message.get("body", b"")
            size += len(part)
            if size > DISCARD * self._most_bytes:
                return None
            if size <= self._most_bytes:
                parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts) if size <= self._most_bytes else None


class ApiKey:
    """ASGI middleware: every path but /health needs the key, as bearer token or as the password of HTTP Basic, which
    is what a browser asks its user for."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": 'Basic realm="kvfold", charset="UTF-8"'}
        message = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
        await _refuse(scope, receive, send, 401, message, "invalid_api_key", headers)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self._key)


async def _refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    message: str,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    # The rest of the body is not read, so the connection cannot serve another request.
    closing = {"Connection": "close", **(headers or {})} if status in (408, 413) else headers
    await JSONResponse(error_body(status, message, code=code), status, closing)(scope, receive, send)
