"""KV caches over plain TCP, one connection for each, with a rate limit for experiments."""

import contextlib
import hmac
import socket
import socketserver
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from kvfold.cluster.transport import Lookup, checked, expected_size, outgoing_parts
from kvfold.engine.handover import Part
from kvfold.errors import TransferError
from kvfold.kv import wire

_ASK = struct.Struct("<32sH")  # the cluster's secret, bytes of the request's id
PIECE = 2**18  # bytes between two looks at the rate
CONNECT_SECONDS = 5.0


class Link:
    """A line that all of a worker's caches leave by. gbps: 10^9 bits per second; None: as fast as it goes."""

    def __init__(self, gbps: float | None = None) -> None:
        self._rate = None if gbps is None else gbps * 1e9 / 8
        self._free = 0.0  # when everything until now has left
        self._lock = threading.Lock()

    def wait(self, size: int) -> None:
        """Returns when `size` more bytes have left."""
        if self._rate is None:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class Doorway(ABC):
    """A port of `host` where other workers ask for caches by request id.

    Whoever does not know the cluster's `secret` (32 bytes) gets nothing. timeout: seconds of silence after which either
    side gives up.
    """

    def __init__(self, host: str, secret: bytes, timeout: float) -> None:
        self._secret = secret
        self._timeout = timeout
        door = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                peer: socket.socket = self.request
                peer.settimeout(timeout)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(OSError, TransferError):  # whoever asked is gone, or is none of us
                    given, length = _ASK.unpack(receive(peer, _ASK.size).tobytes())
                    if hmac.compare_digest(given, secret):
                        door.answer(peer, receive(peer, length).tobytes().decode("utf-8", "replace"))

        self._server = _Server((host, 0), Handler)
        threading.Thread(target=self._server.serve_forever, name="kv transport", daemon=True).start()

    @property
    def address(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    @abstractmethod
    def answer(self, peer: socket.socket, request_id: str) -> None:
        """Gives a cache to whoever asked for it. May raise OSError and TransferError."""

    def ask(self, address: str, request_id: str) -> socket.socket:
        """A connection to another worker's doorway, asked for a cache. Raises OSError."""
        host, _, port = address.rpartition(":")
        name = request_id.encode()
        peer = socket.create_connection((host, int(port)), timeout=min(CONNECT_SECONDS, self._timeout))
        peer.settimeout(self._timeout)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(_ASK.pack(self._secret, len(name)) + name)
        return peer

    def explain(self, address: str, error: OSError) -> TransferError:
        """What a failed connection means."""
        if isinstance(error, TimeoutError):
            return TransferError(f"the worker at {address} was silent for {self._timeout:g} s; try again")
        return TransferError(f"the connection to {address} failed ({error.strerror or error}); try again")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class TcpTransport(Doorway):
    """See `Transport`. lookup: finds this worker's caches; gbps: limits what leaves."""

    def __init__(
        self, host: str, lookup: Lookup, secret: bytes, gbps: float | None = None, timeout: float = 20.0
    ) -> None:
        self._lookup = lookup
        self._link = Link(gbps)
        super().__init__(host, secret, timeout)

    def answer(self, peer: socket.socket, request_id: str) -> None:
        """See `Doorway.answer`."""
        for head, part in outgoing_parts(self._lookup, request_id, self._timeout):
            self._link.wait(len(head))
            peer.sendall(head)
            for start in range(0, len(part), PIECE):
                piece = part[start : start + PIECE]
                self._link.wait(len(piece))
                peer.sendall(piece.data)

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        """See `Transport.fetch`."""
        try:
            with self.ask(address, request_id) as peer:
                for number in range(len(sizes) + 1):
                    head = receive(peer, wire.FRAME_BYTES).tobytes()
                    size, checksum, is_error = expected_size(number, sizes, head)
                    yield checked(receive(peer, size), checksum, is_error)
        except OSError as error:
            raise self.explain(address, error) from error


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


def receive(peer: socket.socket, size: int) -> Part:
    """So many bytes. Raises OSError, and TransferError where the connection ends before."""
    data = np.empty(size, np.uint8)
    view, done = data.data, 0
    while done < size:
        count = peer.recv_into(view[done:])
        if not count:
            raise TransferError("the other worker ended the connection; the cache is asked for again")
        done += count
    return data
