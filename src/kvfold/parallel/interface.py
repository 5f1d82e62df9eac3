"""Which of this machine's network interfaces the other ranks reach it by."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"


@contextmanager
def listening_towards(host: str, port: int) -> Iterator[None]:
    """Within the context, gloo listens on the interface that leads to `host`, or the one that the user named.

    It would listen where this machine's name leads to: on many machines to themselves, which others cannot reach.
    """
    name = None if os.environ.get(VARIABLE) else interface_towards(host, port)
    if name is None:
        yield
        return
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def interface_towards(host: str, port: int) -> str | None:
    """The interface whose address a connection to `host` would come from; None where there is no telling."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it only chooses a route
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = (name for name, held in psutil.net_if_addrs().items() if own in (each.address for each in held))
    return next(found, None)
