"""Connections that misbehave: rubbish, slowness, pipelining, leaving early."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvfold.server.serve import listen
from tests.server.hostile import RawConnection, assert_error, error_of, undisturbed
from tests.server.running import RunningServer

CHAT, TOKENIZE = "/v1/chat/completions", "/v1/tokenize"
MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'


@pytest.fixture(scope="module", autouse=True)
def witness(server: RunningServer) -> Iterator[None]:
    """All of this happens beside a stream that must not change."""
    with undisturbed(server, "zeroc(bits=4)"):
        yield


def test_ids_of_clients_reach_no_header(server: RunningServer) -> None:
    body = f'{{{MESSAGES}, "max_tokens": 1, "user": "a\\r\\nX-Evil: 1"}}'.encode()
    ids = [b"a\r\nX-Evil: 1", b"\xff\xfe", b"\xc3\xa9", b"x" * 8000]
    for value in ids:
        with RawConnection(server) as raw:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value
            raw.send(head + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            answers = raw.answers()
        assert [status for status, _ in answers] == [200]
        assert b"evil" not in answers[0][1].lower()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # a TLS greeting
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\rb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n: empty\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000,
        b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_http(server: RunningServer, data: bytes) -> None:
    with RawConnection(server) as raw:
        raw.send(data)
        ((status, body),) = raw.answers()
    assert status == 400
    error_of(body)


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    with RawConnection(server) as raw:
        raw.send(
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"rubbish\r\n\r\n"
        )
        statuses = [status for status, _ in raw.answers()]
    assert statuses == [200, 404] * 3 + [400]


def test_clients_that_leave_early(server: RunningServer) -> None:
    body = f'{{{MESSAGES}, "stream": true}}'.encode()
    request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        CHAT.encode(),
        len(body),
    )
    for sent in (b"", b"P", request[:40], request, request + body[:5], request + body, (request + body) * 2):
        with RawConnection(server) as raw:
            raw.send(sent)
    server.wait_idle()
    with server.client() as client:
        assert client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def impatient(
    tiny_llama: Path, server_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server that waits three seconds for bodies and headers, with a chat template that raises."""
    model = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(
        "{% if messages[0]['content'] == 'divide' %}{{ 1 // 0 }}{% endif %}{{ raise_exception('only <poems>') }}"
    )
    options = ("--served-model-name", "tiny", "--kv-memory", "8MiB", "--body-timeout", "3")
    with RunningServer(model, *options, cache=server_cache) as server:
        yield server


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", [408]),
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", [408]),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", [408]),
        (b"G", [408]),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /", [200, 408]),
        (b"", []),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_slow_clients(impatient: RunningServer, data: bytes, statuses: list[int]) -> None:
    """Bodies and headers that never end are refused; connections without a byte are closed."""
    with undisturbed(impatient, "none"), ExitStack() as stack:
        raws = [stack.enter_context(RawConnection(impatient)) for _ in range(20)]
        for raw in raws:
            raw.send(data)
        for raw in raws:
            answers = raw.answers()
            assert [status for status, _ in answers] == statuses
            for status, body in answers:
                if status != 200:
                    error_of(body)


def test_templates_that_raise(impatient: RunningServer) -> None:
    """A template is a program that comes with the model; what it raises is told to the client."""
    with undisturbed(impatient, "none"), impatient.client() as client:
        for content, told in {"Hi": "only <poems>", "divide": "zero"}.items():
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            for path in (CHAT, TOKENIZE):
                assert told in assert_error(client.post(path, json=body), 400)["message"]


def test_no_answer_waits_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
