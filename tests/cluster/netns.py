"""A second host: a network namespace behind a slow, lossy line."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cluster import line

NETEM = ("delay", "10ms", "2ms", "rate", "50mbit", "loss", "1%")  # as in `line`


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
            limited = _lay(stack, near, far)
            run("ip", "link", "set", far, "netns", name)
            if not limited:  # a device that moves loses its queueing discipline
                run(*inside, *_netem(far))
            for place, device, address in (((), near, here), (inside, far, there)):
                run(*place, "ip", "addr", "add", f"{address}/30", "dev", device)
                run(*place, "ip", "link", "set", device, "up")
            run(*inside, "ip", "link", "set", "lo", "up")
        except (AssertionError, OSError) as error:
            pytest.skip(f"no line can be laid between namespaces here: {error}")
        yield inside


def _lay(stack: ExitStack, near: str, far: str) -> bool:
    """Two devices with a line between them: the kernel's where it has netem, else one of our own. Returns whether the
    far end is limited, too."""
    run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
    stack.callback(run, "ip", "link", "del", near, check=False)
    try:
        run(*_netem(near))
    except AssertionError:
        run("ip", "link", "del", near)
        stack.enter_context(line.line(near, far))
        return True
    return False


def _netem(device: str) -> tuple[str, ...]:
    return ("tc", "qdisc", "add", "dev", device, "root", "netem", *NETEM)


def _why_not(name: str) -> str | None:
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc (iproute2)"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    return None
