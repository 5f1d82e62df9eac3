"""A real headless Chromium for the page's tests, and an API whose answers a test writes itself."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from kvfold.server.page import mount_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
METHODS = ["none", "zeroc(bits=4)"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium. Without one the test is skipped, but on CI (environment variable CI) it fails."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = "No Chromium on the PATH: install it (Debian: apt-get install chromium) to test the page."
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    expect.set_options(timeout=30_000)  # a shared core may be slow
    with sync_playwright() as playwright:
        # A container's root has no user namespaces to build Chromium's sandbox from.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, url: str, before: Callable[[Page], None] | None = None, **options: Any) -> Iterator[Page]:
    """`url` in a fresh context with `options`; `before(page)` runs ahead of the first request.

    At the end: no error on the console, no exception in a script, and no request to any other origin.
    Refused API requests, which Chromium reports on the console too, are the tests' own business.
    """
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    origin = urlsplit(url).netloc
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("request", lambda request: urlsplit(request.url).netloc == origin or problems.append(request.url))

    def console(message: Any) -> None:
        from_api = message.text.startswith("Failed to load resource") and "/static/" not in message.location["url"]
        if message.type in ("error", "warning") and not from_api:
            problems.append(f"console: {message.text}")

    page.on("console", console)
    if before is not None:
        before(page)
    page.goto(url)
    yield page
    context.close()
    assert problems == []


@contextmanager
def serve_files() -> Iterator[str]:
    """The address of a server that has the page's files and no API: a ScriptedApi answers for it."""
    app = FastAPI(docs_url=None, openapi_url=None)
    mount_page(app)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def sse(*chunks: dict[str, Any], done: bool = True) -> str:
    """The body of an event stream of `chunks`."""
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(events) + ("data: [DONE]\n\n" if done else "")


def pieces(*texts: str) -> list[dict[str, Any]]:
    """One chunk of a chat completion for each text."""
    return [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]


def answer(*texts: str, method: str = "none", finish: str = "stop") -> str:
    """A complete streamed answer: `texts` are its deltas."""
    kv = {"method": method, "bytes": 1536, "dense_bytes": 6144, "compression": 4.0}
    end = [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts), "kv": kv}},
    ]
    return sse(*pieces(*texts), *end)


def stats(**changes: Any) -> dict[str, Any]:
    """What /stats says of a server with two methods."""
    figures = {"bytes": 2048, "dense_bytes": 8192, "compression": 4.0, "running": 1, "waiting": 0}
    return {
        "model": "scripted",
        "status": "ready",
        "reason": None,
        "restarts": 0,
        "uptime": 61.0,
        "methods": [{"kv": name, **figures} for name in METHODS],
        "pool": {"pages": 8, "page_bytes": 1024, "used": 5, "free": 3, "cached": 1},
        "running": 2,
        "waiting": 0,
        "prompt_tokens": 100,
        "generated_tokens": 50,
        "preemptions": 0,
        "prefix": {"queried_tokens": 0, "hit_tokens": 0},
        "ttft": {"p50": 0.2, "p99": None},
        **changes,
    }


@dataclass
class ScriptedApi:
    """Answers the page's API calls from what a test has set; `bodies` are the chat requests it got.

    `chat(body)` gives the status and body of a chat completion, or None for a connection that breaks.
    """

    chat: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: (200, answer("Hello"))
    ready: dict[str, Any] | None = field(default_factory=lambda: {"status": "ready", "reason": None, "restarts": 0})
    stats: dict[str, Any] | None = field(default_factory=stats)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def install(self, page: Page) -> None:
        """Stand between `page` and its server for every path of the API."""
        page.route("**/v1/chat/completions", self._chat)
        page.route("**/ready", lambda route: self._json(route, "ready", self.ready))
        page.route("**/stats", lambda route: self._json(route, "stats", self.stats))
        pool = {"pages": 8, "pages_per_cell": 2, "methods": METHODS}
        cells = {"owner": [0, 1, 2, -1], "filled": [1.0, 0.5, 0.5, 0.0]}
        page.route("**/pool", lambda route: self._json(route, "pool", {**pool, **cells}))

    def _json(self, route: Route, name: str, value: dict[str, Any] | None) -> None:
        self.calls.append(name)
        if value is None:
            return route.abort()
        return route.fulfill(status=503 if value.get("status", "ready") != "ready" else 200, json=value)

    def _chat(self, route: Route) -> None:
        body = route.request.post_data_json
        self.bodies.append(body)
        reply = self.chat(body)
        if reply is None:
            return route.abort()
        status, text = reply
        return route.fulfill(
            status=status, body=text, content_type="text/event-stream" if status == 200 else "application/json"
        )
