"""One streaming request to an OpenAI-compatible server, with the time of every chunk."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import perf_counter
from typing import Any

import httpx2

from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.options import TargetOptions
from kvfold.benchmark.outcome import Outcome

TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
"""Fields of a chat delta that carry generated tokens."""

IDLE_SECONDS = 2.0
"""Keep-alive: shorter than servers' own (5 s in uvicorn), so that no request goes to a connection being closed."""

CONNECTIONS_EACH = 32
OTHER_FILES = 256

PATIENCE = 60.0
"""Seconds for a question that is not measured."""

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def base_url(url: str) -> httpx2.URL:
    """The server's address without `/v1`, which people give or leave out. Raises BenchmarkError if it is none."""
    try:
        parsed = httpx2.URL(url if "://" in url else f"http://{url}")
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BenchmarkError(f"--url {url!r} is no HTTP address; give one such as http://127.0.0.1:8000")
    return parsed.copy_with(path=parsed.path.rstrip("/").removesuffix("/v1") + "/", query=None, fragment=None)


@asynccontextmanager
async def open_clients(target: TargetOptions, connections: int = 1) -> AsyncIterator[list[httpx2.AsyncClient]]:
    """Clients without limits of their own: what waits must wait in the server, or in the measured queue.

    Several for many connections, because a client looks through all its connections for every request.
    """
    url = base_url(target.url)
    headers = {"Accept-Encoding": "identity"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
    verify = httpx2.create_ssl_context()
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx2.AsyncClient(
                    base_url=url,
                    headers=headers,
                    timeout=httpx2.Timeout(PATIENCE),
                    limits=limits,
                    trust_env=url.host not in ("127.0.0.1", "localhost", "::1"),  # no proxy to our own machine
                    verify=verify,
                )
            )
            for _ in range(-(-connections // CONNECTIONS_EACH))
        ]


def allow_connections(count: int) -> None:
    """Let this process have `count` connections, as far as the system permits: the usual 1024 files are too few."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES if hard == resource.RLIM_INFINITY else min(count + OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def stream_completion(
    http: httpx2.AsyncClient,
    path: str,
    body: Mapping[str, Any],
    outcome: Outcome,
    *,
    timeout: float,
    clock: Callable[[], float] = perf_counter,
) -> None:
    """Send `body` to `path` and fill in `outcome`. Failures are recorded, not raised; only cancelling gets through.

    timeout: seconds for the whole answer. clock: gives the times that are recorded.
    """
    content = json.dumps(body).encode()
    outcome.sent = clock()
    try:
        async with (
            asyncio.timeout(timeout),
            http.stream(
                "POST", path, content=content, headers={"Content-Type": "application/json"}, timeout=None
            ) as response,
        ):
            if response.status_code == 200:
                await _read_events(response, outcome, clock)
            else:
                await response.aread()
                outcome.fail(_status_kind(response.status_code), f"{response.status_code}: {error_message(response)}")
    except TimeoutError:
        outcome.fail("timeout", f"no whole answer in {timeout:g} s")
    except httpx2.SSEError as error:
        outcome.fail("protocol", str(error))
    except httpx2.HTTPError as error:
        outcome.fail("connection", f"{type(error).__name__}: {error}")
    except asyncio.CancelledError:
        outcome.fail("interrupted", "the benchmark was stopped")
        raise
    finally:
        if outcome.error is not None or outcome.ended is None:
            outcome.ended = clock()
    if outcome.error is None and outcome.finish_reason is None:
        outcome.fail("incomplete", "the stream ended before the answer did")


async def _read_events(response: httpx2.Response, outcome: Outcome, clock: Callable[[], float]) -> None:
    async for event in httpx2.EventSource(response):
        if not event.data:
            continue  # a block of other fields (`retry`, `id`), which is no event by the standard
        if event.data == "[DONE]":
            outcome.finish_reason = outcome.finish_reason or "done"
            continue  # read to the end of the body, so that the connection can be used again
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            outcome.fail("protocol", f"an event is no JSON: {event.data[:80]!r}")
            return
        if not isinstance(chunk, dict) or event.event == "error" or chunk.get("error"):
            outcome.fail("stream error", _message(chunk) or event.data)
            return
        _take(chunk, outcome, clock)
    if not outcome.counted:
        outcome.output_tokens = len(outcome.arrivals)


def _take(chunk: Mapping[str, Any], outcome: Outcome, clock: Callable[[], float]) -> None:
    """Record one chunk of an answer."""
    for choice in _objects(chunk.get("choices")):
        delta = choice.get("delta")
        source = delta if isinstance(delta, dict) else choice
        if choice.get("text") or any(source.get(name) for name in TEXT_FIELDS):
            outcome.arrivals.append(clock())
            outcome.ended = outcome.arrivals[-1]
        if isinstance(reason := choice.get("finish_reason"), str):
            outcome.finish_reason = reason
            outcome.ended = clock()
    usage = chunk.get("usage")
    if not isinstance(usage, dict):
        return
    details = usage.get("prompt_tokens_details")
    outcome.prompt_tokens = _integer(usage.get("prompt_tokens"))
    outcome.cached_tokens = _integer(details.get("cached_tokens")) if isinstance(details, dict) else None
    if (tokens := _integer(usage.get("completion_tokens"))) is not None:
        outcome.output_tokens, outcome.counted = tokens, True
    if isinstance(kv := usage.get("kv"), dict):
        outcome.kv = kv


def error_message(response: httpx2.Response) -> str:
    """What a server says about a refusal, in one line: OpenAI's shape, FastAPI's, or the text itself."""
    with suppress(ValueError):
        if message := _message(response.json()):
            return message
    return " ".join(response.text.split())[:300] or response.reason_phrase


def _message(answer: Any) -> str:
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return " ".join(answer.split())[:300] if isinstance(answer, str) else ""


def _status_kind(status: int) -> str:
    return "429" if status == 429 else f"{status // 100}xx"


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _integer(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
