"""What the tests of hostile clients share: one answer that others must not disturb, and the shape of errors."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.running import RunningServer

WITNESS = {
    "model": "tiny",
    "prompt": "The scheduler admits a request when",
    "seed": 7,
    "max_tokens": 200,
    "ignore_eos": True,
    "stream": True,
}


def assert_error(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The response is a refusal, one of `statuses` if given, in OpenAI's shape. Returns the error."""
    assert 400 <= response.status_code < 500, response.text
    assert not statuses or response.status_code in statuses, response.text
    assert response.headers["content-type"] == "application/json"
    return error_of(response.content)


def error_of(body: bytes) -> dict[str, Any]:
    """The error of a body in OpenAI's shape."""
    answer = json.loads(body)
    assert set(answer) == {"error"}
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


def streamed_text(client: httpx.Client, body: dict[str, Any]) -> str:
    """The joined text of a streamed completion, which ends as it should."""
    text, done = "", False
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            done = line == "data: [DONE]"
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if done:
                break
    assert done
    return text


@contextmanager
def undisturbed(server: RunningServer, kv: str) -> Iterator[None]:
    """A client streams one seeded answer under `kv` again and again meanwhile, and gets what it got when alone.

    At the end the engine is the same process and every page is back.
    """
    engine = server.engine().pid
    with server.client() as client:
        alone = streamed_text(client, {**WITNESS, "kv": kv})
    texts: list[str | Exception] = []
    ended = threading.Event()

    def work() -> None:
        with server.client() as client:
            while True:
                last = ended.is_set()
                try:
                    texts.append(streamed_text(client, {**WITNESS, "kv": kv}))
                except Exception as error:
                    texts.append(error)
                if last or ended.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(120)
    assert texts
    assert set(texts) == {alone}
    assert server.engine().pid == engine
    server.wait_idle()


class RawConnection:
    """A client that sends the bytes it likes."""

    def __init__(self, server: RunningServer) -> None:
        address = urlsplit(server.url)
        assert address.hostname
        assert address.port
        self.socket = socket.create_connection((address.hostname, address.port), timeout=60)

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answers(self) -> list[tuple[int, bytes]]:
        """Statuses and bodies of the responses until the server closes the connection."""
        data = b""
        try:
            while part := self.socket.recv(65536):
                data += part
        except ConnectionResetError:  # the server closed with bytes of ours unread
            pass
        found = []
        while data:
            head, _, data = data.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
            length = int(headers.get(b"content-length", b"0"))
            found.append((int(lines[0].split()[1]), data[:length]))
            data = data[length:]
        return found
