"""One client's connection: uvicorn's HTTP/1.1, with a time limit for request headers and errors in OpenAI's shape."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvfold.server.http_errors import error_body


class Connection(H11Protocol):
    """uvicorn waits for headers for ever, so that clients which never finish them could take every connection.

    Here a request's headers take at most `header_seconds` from the connection's beginning, or from the first byte
    after the answer before, and a client that reads nothing of its answer for as long is gone.
    """

    header_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._moving()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next request has begun already
            self._watch()

    def pause_writing(self) -> None:
        """The client does not read: after a while it is taken for gone, so that its request is cancelled."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.header_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._moving()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP."""
        self._refuse(400, "this is no valid HTTP/1.1 request")

    def _moving(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if not self.conn.trailing_data[0]:  # nothing was asked, so there is nothing to answer
                self.transport.close()
                return
            self._refuse(408, f"the request's headers did not arrive within {self.header_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(error_body(status, message)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun and cannot be replaced
            events: list[Any] = [h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_class(header_seconds: float) -> type[Connection]:
    """A class for `uvicorn.Config(http=...)`, which gives its protocols no arguments."""
    return type("Connection", (Connection,), {"header_seconds": header_seconds})
