"""A second host: a network namespace behind a slow, lossy line."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

LINE = ("delay", "10ms", "2ms", "rate", "50mbit", "loss", "1%")
WITHOUT_NETEM = ("rate", "50mbit", "burst", "64kb", "latency", "1s")


def run(*command: str, check: bool = True, **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=180, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr


@contextmanager
def second_host(name: str, here: str, there: str) -> Iterator[tuple[str, ...]]:
    """Lays a line from this namespace (address `here`) to a new one (`there`); gives what goes before a command that is
    to run there. Skips the test where that is not possible."""
    reason = _why_not(name)
    if reason is not None:
        pytest.skip(reason)
    inside = ("ip", "netns", "exec", name)
    near, far = f"{name}0", f"{name}1"
    with ExitStack() as stack:
        stack.callback(run, "ip", "netns", "del", name, check=False)
        try:
            run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            run("ip", "addr", "add", f"{here}/30", "dev", near)
            run("ip", "link", "set", near, "up")
            run(*inside, "ip", "addr", "add", f"{there}/30", "dev", far)
            run(*inside, "ip", "link", "set", far, "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            for place, device in (((), near), (inside, far)):
                _limit(place, device)
        except AssertionError as error:
            pytest.skip(f"no line can be laid between namespaces here: {error}")
        yield inside


def _limit(place: tuple[str, ...], device: str) -> None:
    """Delays, limits and loses what a device sends; without netem in the kernel it only limits."""
    command = (*place, "tc", "qdisc", "add", "dev", device, "root")
    try:
        run(*command, "netem", *LINE)
    except AssertionError:
        warnings.warn("this kernel has no netem: the line has a rate, but no delay and no loss", stacklevel=2)
        run(*command, "tbf", *WITHOUT_NETEM)


def _why_not(name: str) -> str | None:
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc (iproute2)"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    return None
