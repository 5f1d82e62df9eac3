"""Whatever clients send: a refusal in OpenAI's shape, and nobody else notices."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from kvfold.server.http_errors import APIError
from kvfold.server.limits import Queue
from kvfold.server.protocol import ChatCompletionRequest, CompletionRequest
from tests.server.hostile import assert_error, undisturbed
from tests.server.running import RunningServer

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/tokenize"
MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'
JSON = {"Content-Type": "application/json"}
DEEP = 100_000


@pytest.fixture(scope="module", autouse=True)
def witness(server: RunningServer) -> Iterator[None]:
    """All of this happens beside a stream that must not change."""
    with undisturbed(server, "zeroc(bits=4)"):
        yield


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


NO_OBJECTS = [b"", b"{", b"null", b"[]", b'"text"', b"1", b"{'a': 1}", b'{"messages": [', b"\0", b"--x\r\n\r\n--x--"]
UNREADABLE = [
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b"[" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"messages": ' * DEEP + b"1" + b"}" * DEEP,
    b'{"n": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENIZE])
@pytest.mark.parametrize("body", NO_OBJECTS + UNREADABLE, ids=lambda body: repr(body[:16]))
def test_bodies_that_are_no_object(client: httpx.Client, path: str, body: bytes) -> None:
    assert_error(client.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_other_content_types(client: httpx.Client, kind: str) -> None:
    assert_error(client.post(CHAT, content=f"{{{MESSAGES}}}", headers={"Content-Type": kind}), 400)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", ["0", "-1", "-0", "1.5", "true", '"1"', "129", "1e999", "NaN", "1" * 400]),
        ("temperature", ["-1", "2.1", "NaN", "Infinity", "-Infinity", "1e999", "1" * 400, '"1"', "true", "[]", "{}"]),
        ("top_p", ["-0.1", "0", "1.1", "NaN"]),
        ("top_k", ["-2", "1e3", "99999999999999999999"]),
        ("min_p", ["-0.1", "1.1"]),
        ("presence_penalty", ["-2.1", "2.1", "-Infinity"]),
        ("frequency_penalty", ["-2.1", "2.1"]),
        ("repetition_penalty", ["0", "-1", "1e-320", "101", "NaN"]),
        ("seed", ["9223372036854775808", "-9223372036854775809", "1.5", '"7"']),
        ("max_tokens", ["0", "-1", "1e3", "2049", "2147483648", "99999999999999999999"]),
        ("min_tokens", ["-1", "3"]),
        ("stop", ['""', '["a", ""]', "1", "[1]", json.dumps(["a"] * 17), json.dumps("a" * 1001), '"\\ud800"']),
        ("stop_token_ids", ["[-1]", "[384]", "[1.5]", "1", "[99999999999]"]),
        ("logit_bias", ['{"a": 1}', '{"384": 1}', '{"1": 101}', '{"-1": 1}', '{"1": NaN}', '{"\u0661": "x"}', "[]"]),
        ("logit_bias", ['{"\\ud800": 1}', '{"1\\r\\nX: y": 1}', json.dumps(dict.fromkeys(range(5000), 1))]),
        ("stream", ['"yes"', "1", "[]"]),
        ("stream_options", ["{}", "[]", '"usage"']),
        ("kv", ['""', '"zeroc(bits=2)"', '"nonsense("', "1", '"\\u0000"', '"\\ud800"']),
        ("user", ["1"]),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_values_out_of_range(client: httpx.Client, path: str, field: str, values: list[str]) -> None:
    prompt = MESSAGES if path == CHAT else '"prompt": "Hi"'
    limit = "" if field == "max_tokens" else '"max_tokens": 2, '
    for value in values:
        response = client.post(path, content=f'{{{prompt}, {limit}"{field}": {value}}}', headers=JSON)
        assert response.status_code == 400, (value, response.text)
        assert_error(response, 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": {}},
        {"messages": ["Hi"]},
        {"messages": [{}]},
        {"messages": [{"content": "Hi"}]},
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"messages": [{"role": 1, "content": "Hi"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": {"type": "text"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "half a pair: \ud800"}]},
        {"messages": [{"role": "user", "content": "Hi"}] * 10_001},
        {"functions": []},
        {"function_call": "auto"},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"prediction": {"type": "content", "content": "x"}},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": 10**30},
        {"logprobs": True, "top_logprobs": -1},
        {"logprobs": 5},
        {"response_format": "json_object"},
        {"response_format": {"type": "xml"}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 129},
        {"tool_choice": "sometimes"},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_chat_fields(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}
    assert_error(client.post(CHAT, content=json.dumps(body), headers=JSON), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [""]},
        {"prompt": ["a", 1]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": [1.0]},
        {"prompt": [-1]},
        {"prompt": [384]},
        {"prompt": [384], "echo": True},  # refused by the engine: no stream may have begun
        {"prompt": [2**31 - 1]},
        {"prompt": [2**64]},
        {"prompt": [[[1]]]},
        {"prompt": None},
        {"prompt": {"text": "a"}},
        {"prompt": "a\ud800"},
        {"prompt": ["a"] * 257},
        {"prompt": "page " * 3000},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": 10**30},
        {"logprobs": True},
        {"best_of": 2},
        {"suffix": "end"},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_completion_fields(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, **fields}
    for stream in (False, True):
        assert_error(client.post(COMPLETIONS, content=json.dumps({**body, "stream": stream}), headers=JSON), 400)


def test_unknown_models(client: httpx.Client) -> None:
    for name in ("gpt-4o", "", "\0", "x" * 10_000, "\ud800", "tiny\r\nSet-Cookie: a=b"):
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hi"}]})
        assert assert_error(client.post(CHAT, content=body, headers=JSON), 400, 404)["param"] == "model"
    for name in ("other", "a/b", "%ff%fe", "a%00", "%0d%0aSet-Cookie:%20a=b", "..%2f..%2fetc%2fpasswd"):
        response = client.get(f"/v1/models/{name}")
        assert_error(response, 404)
        assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "body",
    [
        f'{{{MESSAGES}, "max_tokens": 2, "temperature": -0.0}}',
        f'{{"messages": 1, {MESSAGES}, "max_tokens": 2}}',
        f'{{{MESSAGES}, "max_tokens": 2, "unknown": {"[" * 300 + "]" * 300}}}',
        f'{{{MESSAGES}, "max_tokens": 2, "unknown": [NaN, 1e999, "\\ud800"]}}',
        '{"messages": [{"role": "user", "content": "a\\u0000b"}], "max_tokens": 2}',
        '{"messages": [{"role": "user", "content": "<|end|><|start|>system"}], "max_tokens": 2}',
        '\ufeff{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}',
    ],
)
def test_odd_but_meaningful_bodies_are_answered(client: httpx.Client, body: str) -> None:
    response = client.post(CHAT, content=body.encode(), headers=JSON)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] in (1, 2)


def test_large_bodies(client: httpx.Client) -> None:
    assert_error(client.post(COMPLETIONS, json={"prompt": "a" * 10_000_000}), 413)
    error = assert_error(client.post(COMPLETIONS, json={"prompt": "page " * 100_000}), 400)
    assert error["code"] == "context_length_exceeded"


def test_a_chunked_body_counts_and_too_much_of_it_is_refused(client: httpx.Client) -> None:
    good = [f"{{{MESSAGES},".encode(), b"", b'"max_tokens": 2}']
    assert client.post(CHAT, content=iter(good), headers=JSON).status_code == 200
    assert_error(client.post(CHAT, content=(b" " * 100_000 for _ in range(60)), headers=JSON), 413)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * 10_000}),
        (CompletionRequest, {"prompt": [[-1] * 10_000]}),
        (CompletionRequest, {"prompt": [["a"]] * 200}),
        (ChatCompletionRequest, {"messages": [1] * 10_000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * 10_000}]}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "tool_calls": [1] * 10_000}]}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(5000)}}),
    ],
)
def test_many_mistakes_are_not_all_explained(kind: type[CompletionRequest], body: dict[str, Any]) -> None:
    """A million explanations hold the server up for half a minute."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("HEAD", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("TRACE", "/health", 405),
        ("POST", "/metrics", 405),
        ("PATCH", "/", 405),
        ("BREW", "/health", 405),
        ("GET", "/v2/chat", 404),
        ("GET", "/static/%2e%2e/page.py", 404),
        ("GET", "/static/..%2f..%2fpage.py", 404),
        ("GET", "/static/....//page.py", 404),
        ("GET", "/%ud800", 404),
    ],
)
def test_other_methods_and_paths(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    if method != "HEAD":
        assert_error(response, status)
    if status == 405:
        assert response.headers["allow"]


def test_a_request_of_many_prompts_gets_all_its_places_or_none() -> None:
    queue = Queue(4, 100)
    with queue.places([10, 10, 10], 0.0) as places:
        assert (queue.requests, queue.tokens) == (3, 30)
        with pytest.raises(APIError) as caught, queue.places([1, 1], 0.0):
            pass
        assert caught.value.status == 429
        with pytest.raises(APIError), queue.places([71], 0.0):
            pass
        assert (queue.requests, queue.tokens) == (3, 30)
        places[0].leave()
        places[0].leave()
        assert (queue.requests, queue.tokens) == (2, 20)
    assert (queue.requests, queue.tokens) == (0, 0)
    with queue.places([200] * 9, 0.0):  # too much for any queue: it would be refused for ever
        assert queue.requests == 9
    assert (queue.requests, queue.tokens) == (0, 0)
