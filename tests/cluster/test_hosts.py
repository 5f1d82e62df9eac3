"""Two hosts: Ray nodes in network namespaces of their own, with a slow, lossy line between them."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.cluster.serving import wait_fetched
from tests.server.running import RunningServer

NAMESPACE, INSIDE, OUTSIDE = "kvfold-test", "kvfold1", "kvfold0"
HEAD, OTHER, PORT = "10.213.7.1", "10.213.7.2", 26379
LINE = ("delay", "10ms", "2ms", "rate", "50mbit", "loss", "1%")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # all nodes of a cluster know it
RAY = str(Path(sys.executable).with_name("ray"))
PROMPT = "A page belongs to one sequence. " * 20


def run(*command: str, check: bool = True) -> None:
    own = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", **TOKEN}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, timeout=180, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr


def limit(place: tuple[str, ...], device: str) -> None:
    """Delays, limits and loses what a device sends; without netem in the kernel it only limits."""
    try:
        run(*place, "tc", "qdisc", "add", "dev", device, "root", "netem", *LINE)
    except AssertionError:
        warnings.warn("this kernel has no netem: the line has a rate, but no delay and no loss", stacklevel=2)
        run(
            *place,
            "tc",
            "qdisc",
            "add",
            "dev",
            device,
            "root",
            "tbf",
            "rate",
            "50mbit",
            "burst",
            "64kb",
            "latency",
            "1s",
        )


def stop_nodes() -> None:
    """`ray stop` would stop the Ray of other tests, too."""
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if HEAD in command or OTHER in command:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc (iproute2)"
    if subprocess.run(["ip", "netns", "add", NAMESPACE], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    return None


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """This namespace is the head node; another one, behind a line that delays, limits and loses, is the second."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    inside = ("ip", "netns", "exec", NAMESPACE)
    with ExitStack() as stack:
        stack.callback(run, "ip", "netns", "del", NAMESPACE, check=False)
        try:
            run("ip", "link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", NAMESPACE)
            run("ip", "addr", "add", f"{HEAD}/30", "dev", OUTSIDE)
            run("ip", "link", "set", OUTSIDE, "up")
            run(*inside, "ip", "addr", "add", f"{OTHER}/30", "dev", INSIDE)
            run(*inside, "ip", "link", "set", INSIDE, "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            for place, device in (((), OUTSIDE), (inside, INSIDE)):
                limit(place, device)
        except AssertionError as error:
            pytest.skip(f"no line can be laid between namespaces here: {error}")
        stack.callback(stop_nodes)
        common = ("--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000")
        run(RAY, "start", "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false", *common)
        run(*inside, RAY, "start", f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}", *common)
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
