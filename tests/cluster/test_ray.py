"""Real workers: Ray actors behind the real server, killed as processes are."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.serving import wait_fetched, wait_up
from tests.server.running import RunningServer

SCHEDULES = int(os.environ.get("KVFOLD_KILLS", "6"))
METHODS = ("none", "zeroc(bits=4)", "h2o(budget=60)")
PROMPTS = ["A page belongs to one sequence. " * n for n in (1, 8, 20)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster-cache")


def start(model: Path, cache: Path, *options: str) -> RunningServer:
    kv = [part for method in METHODS for part in ("--kv", method)]
    common = ("--kv-memory", "8MiB", "--served-model-name", "tiny", "--dtype", "float32", "--threads", "1")
    return RunningServer(model, *kv, *common, *options, cache=cache)


def body(prompt: str, kv: str, **more: Any) -> dict[str, Any]:
    own = {"model": "tiny", "prompt": prompt, "kv": kv, "max_tokens": 40, "seed": 3, "temperature": 1.0}
    return {**own, "ignore_eos": True, **more}


def complete(server: RunningServer, *arguments: Any, **more: Any) -> list[str]:
    with server.client(timeout=120.0) as client:
        answer = client.post("/v1/completions", json=body(*arguments, **more))
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, cache: Path) -> dict[tuple[str, str], list[str]]:
    """What a server with one engine answers."""
    with start(tiny_llama, cache) as server:
        return {(p, kv): complete(server, p, kv) for p in PROMPTS for kv in METHODS}


def actors(server: RunningServer) -> list[psutil.Process]:
    """The workers' processes. Ray starts them from a process of its own, in this server's session."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [p for p in family if "ray::Worker" in " ".join(p.cmdline())]


@pytest.mark.parametrize("transport", ["tcp", "ray", "gloo"])
def test_a_cluster_answers_as_one_engine(
    tiny_llama: Path, cache: Path, expected: dict[tuple[str, str], list[str]], transport: str
) -> None:
    with start(
        tiny_llama, cache, "--prefill-workers", "1", "--decode-workers", "1", "--transport", transport
    ) as server:
        for (prompt, kv), texts in expected.items():
            assert complete(server, prompt, kv) == texts
        workers = wait_fetched(server, len(expected))
        with server.client() as client:
            metrics = client.get("/metrics").text
        assert sum(worker["lost"] for worker in workers) == 0
        assert "kvfold:worker_handover_bytes_total" in metrics
        children = psutil.Process(server.process.pid).children(recursive=True)
    psutil.wait_procs(children, timeout=20)
    assert not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, cache: Path) -> Iterator[RunningServer]:
    with start(tiny_llama, cache, "--prefill-workers", "1", "--decode-workers", "1", "--stall-seconds", "5") as server:
        yield server


def asked(server: RunningServer, jobs: list[tuple[str, str]]) -> Callable[[], list[Any]]:
    """Asks all at once, in threads; call the result for the answers or errors."""
    found: list[Any] = [None] * len(jobs)

    def one(index: int, prompt: str, kv: str) -> None:
        with server.client(timeout=120.0) as client:
            answer = client.post("/v1/completions", json=body(prompt, kv)).json()
        found[index] = answer["choices"][0]["text"] if "choices" in answer else answer["error"]

    threads = [threading.Thread(target=one, args=(i, *job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()

    def wait() -> list[Any]:
        for thread in threads:
            thread.join()
        return found

    return wait


@pytest.mark.timeout(300 + 30 * SCHEDULES)
def test_killed_workers_change_no_answer(pair: RunningServer, expected: dict[tuple[str, str], list[str]]) -> None:
    """A worker is killed at a random moment of three requests; KVFOLD_KILLS says how often."""
    rng = random.Random(7)
    for _ in range(SCHEDULES):
        wait_up(pair, 2)
        jobs = rng.sample(list(expected), 3)
        answers = asked(pair, jobs)
        time.sleep(rng.random() * 0.8)
        victim = rng.choice(actors(pair))
        victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        for job, answer in zip(jobs, answers(), strict=True):
            assert answer == expected[job][0]
    wait_up(pair, 2)


def test_a_worker_that_hangs_is_replaced(pair: RunningServer, expected: dict[tuple[str, str], list[str]]) -> None:
    wait_up(pair, 2)
    actors(pair)[-1].suspend()
    job = next(iter(expected))
    assert asked(pair, [job])() == expected[job]
    wait_up(pair, 2)


@pytest.mark.parametrize("what", ["kvfold.cluster.process", "gcs_server"])
def test_a_lost_router_or_head_node_gives_clean_errors_and_comes_back(
    pair: RunningServer, expected: dict[tuple[str, str], list[str]], what: str
) -> None:
    wait_up(pair, 2)
    jobs = list(expected)[:3]
    answers = asked(pair, jobs)
    time.sleep(0.3)
    family = psutil.Process(pair.process.pid).children(recursive=True)
    [victim] = [p for p in family if what in " ".join(p.cmdline())]
    victim.kill()
    for job, answer in zip(jobs, answers(), strict=True):
        assert answer == expected[job][0] or answer["code"] in ("engine_died", "engine_not_ready")
    deadline = time.monotonic() + 120
    while True:  # the head node is missed only after a while
        try:
            pair.wait_ready()
            wait_up(pair, 2)
            assert complete(pair, *jobs[0]) == expected[jobs[0]]
            return
        except (AssertionError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prefill-workers", "1", "--decode-workers", "0"), "--decode-workers 0 is out of range; give at least 1"),
        (("--prefill-workers", "1", "--ray-address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--prefill-workers", "2", "--decode-workers", "2", "--threads", "4096"), "ask for fewer workers or threads"),
        (("--link-gbps", "1"), "give --prefill-workers"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    tiny_llama: Path, cache: Path, options: tuple[str, ...], says: str
) -> None:

    command = [
        str(Path(sys.executable).with_name("kvfold")),
        "serve",
        "--model",
        str(tiny_llama),
        "--port",
        "0",
        *options,
    ]
    own = {"KVFOLD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, timeout=120, check=False)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
