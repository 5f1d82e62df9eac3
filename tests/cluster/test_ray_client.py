"""Workers in a Ray cluster of somebody else's, reached by Ray Client: ray:// addresses."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.utils import check_version_info

from kvfold import LLM, SamplingParams
from kvfold.cluster.options import ClusterOptions
from kvfold.cluster.ray_workers import RayWorkers
from kvfold.errors import ClusterError
from tests.cluster.serving import wait_fetched
from tests.server.running import READY_SECONDS, RunningServer

OWN = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_worker_niceness": "0",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
BIN = Path(sys.executable).parent
PROMPT = "A page belongs to one sequence. " * 8
TINY = ("--kv-memory", "8MiB", "--dtype", "float32", "--threads", "1", "--served-model-name", "tiny")


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
    return port


@contextmanager
def head_node(port: int, own: int) -> Iterator[psutil.Process]:
    """The process of a head node with Ray Client at `port`. `ray stop` would stop the Ray of other tests, too."""
    place = ("--node-ip-address=127.0.0.1", f"--port={own}", f"--ray-client-server-port={port}")
    sizes = ("--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # sockets want a short path
        command = [str(BIN / "ray"), "start", "--head", "--block", *place, *sizes, f"--temp-dir={folder}"]
        process = psutil.Popen(command, env=os.environ | OWN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_open(port)
            yield process
        finally:
            family = [*process.children(recursive=True), process]
            process.terminate()
            for each in psutil.wait_procs(family, timeout=5)[1]:
                each.kill()
            process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a head node."""
    port = free_port()
    with head_node(port, free_port()) as process:
        yield f"ray://127.0.0.1:{port}", process


def wait_open(port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def command_of(process: psutil.Process) -> str:
    """Its command line; processes that have just ended have none."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> str:
    """What one engine answers."""
    llm = LLM(str(tiny_llama), dtype="float32", kv_memory=8 * 2**20)
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    return output.outputs[0].text


@pytest.mark.parametrize("transport", ["tcp", "ray"])
def test_a_foreign_cluster_serves_and_is_left_as_it_was(
    tiny_llama: Path, tmp_path: Path, head: tuple[str, psutil.Process], expected: str, transport: str
) -> None:
    """Both servers want all of its cores: the second one starts only if the first has given them back."""
    address, process = head
    place = ("--ray-address", address, "--prefill-workers", "1", "--decode-workers", "1", "--transport", transport)
    with RunningServer(tiny_llama, *place, *TINY, cache=tmp_path, **OWN) as server:
        with server.client() as client:
            asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json=asked)
        assert answer.json()["choices"][0]["text"] == expected
        assert sum(worker["lost"] for worker in wait_fetched(server, 1)) == 0
        workers = [p for p in process.children(recursive=True) if "ray::Worker" in command_of(p)]
        assert len(workers) == 2
    assert "Traceback" not in "".join(server.log)
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert process.is_running()


def test_a_head_node_that_is_lost_gives_clean_errors_and_is_waited_for(
    tiny_llama: Path, tmp_path: Path, expected: str
) -> None:
    port, own = free_port(), free_port()
    place = ("--ray-address", f"ray://127.0.0.1:{port}", "--prefill-workers", "1", "--decode-workers", "1")
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    long = {**asked, "max_tokens": 400}
    with ExitStack() as stack:
        first = stack.enter_context(head_node(port, own))
        server = stack.enter_context(RunningServer(tiny_llama, *place, *TINY, cache=tmp_path, **OWN))
        with server.client(timeout=120.0) as client, ThreadPoolExecutor() as threads:
            answer = threads.submit(client.post, "/v1/completions", json=long)
            time.sleep(0.5)
            for each in [first, *first.children(recursive=True)]:
                each.kill()
            answered = answer.result()
            assert answered.status_code == 200 or answered.json()["error"]["code"] in (
                "engine_died",
                "engine_not_ready",
            )
            stack.enter_context(head_node(port, own))
            server.wait_ready()
            assert "Traceback" not in "".join(server.log)
            again = client.post("/v1/completions", json={**asked, "max_tokens": 20})
        assert again.json()["choices"][0]["text"] == expected


def test_an_address_that_does_not_answer_is_said_in_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    short = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"ray://127.0.0.1:{mute.getsockname()[1]}"
        command = [str(BIN / "kvfold"), "serve", "--model", str(tiny_llama), "--port", "0"]
        command += ["--prefill-workers", "1", "--ray-address", address]
        own = os.environ | {"KVFOLD_CACHE": str(tmp_path)} | short
        done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=60, check=False)
    assert done.returncode == 2
    assert f"no Ray cluster answers at {address}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.12.1"}, "Ray Client")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        options = ClusterOptions(ray_address=f"ray://127.0.0.1:{somebody.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"Ray 2\.9\.0 and Python 3\.12\.1, kvfold Ray .*; install"):
            RayWorkers({}, options)
