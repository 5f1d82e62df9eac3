"""Two hosts: Ray nodes in network namespaces of their own, with a slow, lossy line between them."""

import contextlib
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.cluster.netns import run, second_host
from tests.cluster.serving import wait_fetched
from tests.server.running import RunningServer

HEAD, OTHER, PORT = "10.213.7.1", "10.213.7.2", 26379
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # all nodes of a cluster know it
OWN = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", **TOKEN}
RAY = str(Path(sys.executable).with_name("ray"))
PROMPT = "A page belongs to one sequence. " * 20


def stop_nodes() -> None:
    """`ray stop` would stop the Ray of other tests, too."""
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if HEAD in command or OTHER in command:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """This namespace is the head node; another one, behind a line that delays, limits and loses, is the second."""
    with second_host("kvfold", HEAD, OTHER) as inside, ExitStack() as stack:
        stack.callback(stop_nodes)
        common = ("--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000")
        head = ("--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false")
        run(RAY, "start", *head, *common, **OWN)
        run(*inside, RAY, "start", f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}", *common, **OWN)
        yield


KV = (
    "--kv",
    "none",
    "--kv",
    "zeroc(bits=4)",
    "--kv-memory",
    "8MiB",
    "--served-model-name",
    "tiny",
    "--dtype",
    "float32",
)


def answers(server: RunningServer) -> list[str]:
    found = []
    for method in ("none", "zeroc(bits=4)"):
        body = {"model": "tiny", "prompt": PROMPT, "kv": method, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        with server.client(timeout=120.0) as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["choices"][0]["text"])
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts-cache")


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, cache: Path) -> list[str]:
    with RunningServer(tiny_llama, *KV, "--threads", "1", cache=cache) as server:
        return answers(server)


@pytest.mark.parametrize("transport", ["tcp", "gloo"])
def test_two_hosts_answer_as_one(
    tiny_llama: Path, hosts: None, cache: Path, expected: list[str], transport: str
) -> None:
    place = ("--ray-address", f"{HEAD}:{PORT}", "--prefill-workers", "1", "--decode-workers", "1", "--threads", "1")
    with RunningServer(tiny_llama, *KV, *place, "--transport", transport, cache=cache, **TOKEN) as server:
        assert answers(server) == expected
        workers = wait_fetched(server, len(expected))
    assert sum(worker["lost"] for worker in workers) == 0
