"""A line between two network namespaces that delays, limits and loses packets, where the kernel cannot (netem)."""

import asyncio
import fcntl
import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SECONDS, JITTER, BITS_PER_SECOND, LOST = 0.010, 0.002, 50e6, 0.01
WAITING = 1000  # packets that a direction holds; more are lost
LARGEST = 2**16


def _device(name: str) -> int:
    """A new network device of this namespace; what is sent through it is read from the file, and the other way."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return file


class _Direction:
    """Carries packets from one device to another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: int, target: int, seed: int) -> None:
        self._loop, self._source, self._target = loop, source, target
        self._draw = random.Random(seed)
        self._free = 0.0  # when the last packet has left
        self._waiting = 0
        loop.add_reader(source, self._read)

    def _read(self) -> None:
        packet = os.read(self._source, LARGEST)
        if self._waiting >= WAITING or self._draw.random() < LOST:
            return
        self._waiting += 1
        self._free = max(self._free, self._loop.time()) + 8 * len(packet) / BITS_PER_SECOND
        jitter = self._draw.uniform(-JITTER, JITTER)
        self._loop.call_at(self._free + SECONDS + jitter, self._arrive, packet)

    def _arrive(self, packet: bytes) -> None:
        self._waiting -= 1
        with suppress(OSError):  # a device that is down loses what comes
            os.write(self._target, packet)


@contextmanager
def line(near: str, far: str) -> Iterator[None]:
    """Devices of these names, both in this namespace at first, joined for as long as this lasts. Raises OSError where
    that is not possible."""
    files = [_device(near), _device(far)]
    loop = asyncio.new_event_loop()
    for seed, (source, target) in enumerate((files, files[::-1])):
        _Direction(loop, source, target, seed)
    thread = threading.Thread(target=loop.run_forever, name="line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        for file in files:
            os.close(file)
