"""Streams: any cutting of the bytes gives the same answer, and every ending has its name."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import count, pairwise
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.benchmark.client import base_url, error_message, open_clients, stream_completion
from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.options import TargetOptions
from kvfold.benchmark.outcome import Outcome

CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "héllo \u2028 \x85 😀"}}]},
    {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9, "kv": {"bytes": 5, "dense_bytes": 20}}},
]


class Bytes(httpx2.AsyncByteStream):
    """A body that comes in given pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def answer(pieces: Sequence[bytes], status: int = 200, content_type: str = "text/event-stream") -> Outcome:
    """What the client makes of a response."""
    outcome = Outcome(0, 7, 9, 0.0)
    ticks = count()

    def respond(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers={"content-type": content_type}, stream=Bytes(pieces))

    async def ask() -> None:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(respond), base_url="http://x") as http:
            await stream_completion(http, "/v1", {}, outcome, timeout=10, clock=lambda: float(next(ticks)))

    asyncio.run(ask())
    return outcome


def encode(chunks: Sequence[dict[str, Any]], end: str, pretty: bool, ascii_only: bool) -> bytes:
    """An event stream with comments, other fields and, if `pretty`, data of several lines."""
    lines = [": comment", "retry: 10", ""]
    for chunk in chunks:
        text = json.dumps(chunk, indent=1 if pretty else None, ensure_ascii=ascii_only)
        lines += ["event: message", *(f"data: {line}" for line in text.split("\n")), ": comment", ""]
    return (end.join([*lines, "data:[DONE]", "", ""])).encode()


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans(), st.lists(st.integers(0, 2000), max_size=40))
def test_any_cutting_gives_the_same_events(end: str, pretty: bool, ascii_only: bool, cuts: list[int]) -> None:
    body = encode(CHUNKS, end, pretty, ascii_only)
    places = sorted({0, len(body), *(cut % len(body) for cut in cuts)})
    found = answer([body[a:b] for a, b in pairwise(places)])
    # Ticks of the clock: 0 when sent, then one for each text and one for the end.
    assert found.arrivals == [1, 2, 3]
    assert (found.sent, found.ended) == (0, 4)
    assert (found.error, found.finish_reason) == (None, "stop")
    assert (found.prompt_tokens, found.output_tokens, found.counted) == (7, 9, True)
    assert found.kv == {"bytes": 5, "dense_bytes": 20}


def test_byte_by_byte_is_the_same() -> None:
    body = encode(CHUNKS, "\r\n", True, False)
    assert answer([bytes([byte]) for byte in body]).arrivals == [1, 2, 3]


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


TEXT = event({"choices": [{"text": "a"}]})


def test_without_usage_the_chunks_are_counted() -> None:
    found = answer([TEXT, TEXT, event({"choices": [{"text": "", "finish_reason": "length"}]}), event(b"[DONE]")])
    assert found.succeeded
    assert (found.output_tokens, found.counted, found.prompt_tokens) == (2, False, None)


@pytest.mark.parametrize(
    ("body", "kind", "detail"),
    [
        (TEXT + event({"error": {"message": "engine\ndied"}}), "stream error", "engine died"),
        (TEXT + b"event: error\n" + event({"message": "gone"}), "stream error", "gone"),
        (TEXT + event(b"{"), "protocol", "no JSON"),
        (TEXT + event([1]), "stream error", "[1]"),
        (TEXT, "incomplete", "before the answer"),
        (b"", "incomplete", "before the answer"),
    ],
)
def test_broken_streams_are_failures(body: bytes, kind: str, detail: str) -> None:
    found = answer([body])
    assert (found.succeeded, found.error) == (False, kind)
    assert detail in (found.detail or "")
    assert found.ended is not None


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "429"), (400, "4xx"), (404, "4xx"), (500, "5xx"), (503, "5xx"), (307, "3xx")]
)
def test_refusals_are_named_by_their_status(status: int, kind: str) -> None:
    found = answer([b'{"error": {"message": "because"}}'], status, "application/json")
    assert (found.error, found.detail) == (kind, f"{status}: because")


def test_an_answer_that_is_no_stream_is_a_failure() -> None:
    assert answer([b"{}"], content_type="application/json").error == "protocol"


FIELDS = ("choices", "delta", "usage", "error", "content", "prompt_tokens", "prompt_tokens_details", "finish_reason")
SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(SCALARS, lambda s: st.lists(s) | st.dictionaries(st.sampled_from(FIELDS), s))


@given(VALUES)
def test_no_chunk_raises(value: Any) -> None:
    found = answer([event(value), event(b"[DONE]")])
    assert found.succeeded or found.error in ("stream error", "protocol")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "a  b"}}', "a b"),
        (b'{"detail": "not found"}', "not found"),
        (b'{"object": "error", "message": "old"}', "old"),
        (b"<h1>no</h1>", "<h1>no</h1>"),
        (b"", "Bad Request"),
    ],
)
def test_error_messages_of_any_shape(body: bytes, message: str) -> None:
    assert error_message(httpx2.Response(400, content=body)) == message


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1", "h:1/v1?x=1"])
def test_addresses_with_and_without_v1_are_the_same(url: str) -> None:
    assert str(base_url(url)) == "http://h:1/"


@pytest.mark.parametrize("url", ["", "http://", "ftp://h", "http://h:x", "::"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BenchmarkError, match="--url"):
        base_url(url)


@pytest.mark.parametrize(("connections", "clients"), [(1, 1), (32, 1), (33, 2), (1000, 32)])
def test_clients_share_the_connections_and_the_key(connections: int, clients: int) -> None:
    async def keys(key: str | None) -> list[str | None]:
        async with open_clients(TargetOptions("http://h", api_key=key), connections) as found:
            return [client.headers.get("authorization") for client in found]

    assert asyncio.run(keys("secret")) == ["Bearer secret"] * clients
    assert asyncio.run(keys(None)) == [None] * clients
