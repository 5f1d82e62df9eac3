"""Starting, dying, restarting, draining: what the operator of a server lives with."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.running import RunningServer

Start = Callable[..., RunningServer]
LONG = {"prompt": "A page", "max_tokens": 480, "ignore_eos": True, "stream": True, "seed": 1}


class Streaming:
    """One long request in a thread: `begun` at its first chunk, `text` and `error` as far as it came."""

    def __init__(self, server: RunningServer, **body: object) -> None:
        self.begun, self.lines = threading.Event(), list[str]()
        self._thread = threading.Thread(target=self._run, args=(server.url, {**LONG, **body}))
        self._thread.start()
        assert self.begun.wait(60)

    def _run(self, url: str, body: dict[str, object]) -> None:
        with (
            suppress(httpx.RemoteProtocolError),  # a server that stops at once cuts its streams
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
        ):
            for line in response.iter_lines():
                self.lines.append(line)
                self.begun.set()

    def join(self) -> list[str]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return [line for line in self.lines if line]


def slow(**body: object) -> dict[str, object]:
    """So many completions at once that they take a while even with a tiny model."""
    return {"n": 32, "temperature": 1.0, **body}


def test_a_dead_engine_is_replaced_once(start_server: Start) -> None:
    server = start_server()
    running = Streaming(server, **slow())
    server.kill_engine()
    (*_, last) = running.join()
    assert "engine_died" in last
    server.wait_ready()
    assert server.status()["restarts"] == 1
    assert any("SIGKILL" in line for line in server.log)
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"}, timeout=60).status_code == 200
    server.kill_engine()
    server.wait_ready("failed")
    assert "SIGKILL" in server.status()["reason"]
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"}, timeout=10)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_not_ready"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_unstreamed_request_gets_a_500_when_the_engine_dies(start_server: Start) -> None:
    server = start_server()
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json={**LONG, **slow(stream=False)}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    while not httpx.get(f"{server.url}/stats").json()["running"]:
        pass
    server.kill_engine()
    thread.join(60)
    assert answers[0].status_code == 500
    assert "SIGKILL" in answers[0].json()["error"]["message"]


def test_sigterm_lets_running_requests_finish(start_server: Start) -> None:
    server = start_server()
    engine = server.engine()
    running = Streaming(server, **slow())
    server.signal(signal.SIGTERM)
    server.wait_ready("draining")
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"})
    assert refused.status_code == 503
    assert running.join()[-1] == "data: [DONE]"
    assert server.wait() == 0
    assert not engine.is_running()


def test_second_signal_stops_at_once(start_server: Start) -> None:
    server = start_server()
    engine = server.engine()
    running = Streaming(server, **slow(n=100))
    server.signal(signal.SIGINT)
    server.wait_ready("draining")
    server.signal(signal.SIGINT)
    server.wait()
    assert "data: [DONE]" not in running.lines
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running()


def test_grace_ends(start_server: Start) -> None:
    server = start_server("--grace", "0")
    running = Streaming(server, **slow(n=100))
    server.signal(signal.SIGTERM)
    server.wait()
    assert "shutting down" in running.join()[-1]


def test_engine_ends_with_a_killed_server(start_server: Start) -> None:
    server = start_server()
    engine = server.engine()
    server.signal(signal.SIGKILL)
    server.wait()
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running()


def test_request_timeout(start_server: Start) -> None:
    server = start_server("--request-timeout", "0.5")
    answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, **slow(n=128, stream=False)}, timeout=60)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    server.wait_idle()


def test_full_queue_answers_429(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "reference")  # the running request is to outlast all that follows
    server = start_server("--max-queue", "2", "--max-sequences", "1")
    streams = [Streaming(server)]
    streams += [
        threading.Thread(
            target=httpx.post,
            args=(f"{server.url}/v1/completions",),
            kwargs={"json": {**LONG, "stream": False}, "timeout": 60},
        )
        for _ in range(2)
    ]
    for thread in streams[1:]:
        thread.start()
    while httpx.get(f"{server.url}/stats").json()["waiting"] < 2:
        pass
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    for stream in streams:
        stream.join()
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"}, timeout=60).status_code == 200


def test_api_key_guards_everything_but_health(start_server: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    server = start_server("--api-key-file", str(tmp_path / "key"), wait=False)  # /ready needs the key
    paths = ["/", "/ready", "/stats", "/pool", "/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing"]
    for path in paths:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic ="}):
            answer = httpx.get(server.url + path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", auth=("any", "s3cret")).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv", "zeroc(bit=4)"), "bits"),
        (("--kv", "none", "--port", "99999"), "65535"),
        (("--kv-memory", "1"), "kv_memory"),
        (("--api-key", "a", "--api-key-file", "b"), "contradict"),
        (("--api-key", " "), "API key"),
        (("--log-level", "loud"), "info"),
        (("--host", "no.such.host.invalid"), "cannot listen"),
        (("--max-queue", "0"), "max_queue"),
    ],
)
def test_wrong_options_end_with_one_sentence(
    tiny_model: Path, server_cache: Path, options: tuple[str, ...], message: str
) -> None:
    command = [str(Path(sys.executable).with_name("kvfold")), "serve", "--model", str(tiny_model), "--port", "0"]
    environment = os.environ | {"KVFOLD_CACHE": str(server_cache)}
    ended = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_stuck_engine_stops_nobody_else(start_server: Start) -> None:
    """Health, readiness and metrics come from the API process; a request that gets nowhere ends by its time limit."""
    server = start_server("--request-timeout", "1")
    engine = server.engine()
    engine.suspend()
    for path in ("/health", "/ready", "/metrics", "/stats", "/v1/models"):
        assert httpx.get(server.url + path, timeout=30).status_code == 200
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"}, timeout=60).status_code == 504
    engine.resume()
    server.wait_idle()
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "A"}, timeout=60).status_code in (200, 504)
