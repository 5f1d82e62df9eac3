"""KV caches by torch.distributed's point-to-point calls, over gloo or NCCL.

Receiver and sender meet in a group of two that is made for one cache: one that breaks concerns no other, and nobody has
to know all workers from the beginning. Whoever wants a cache asks at the sender's doorway, which answers where to meet.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from kvfold.cluster.reason import first_line
from kvfold.cluster.tcp import Doorway, receive
from kvfold.cluster.transport import Lookup, checked, expected_size, outgoing_parts
from kvfold.engine.handover import Part
from kvfold.errors import ConfigError, TransferError
from kvfold.kv import wire

dist: Any = torch.distributed  # whose stubs lack what groups of one's own need
_PORT = struct.Struct("<H")
SENDER, RECEIVER = 0, 1


class GlooTransport(Doorway):
    """See `Transport`. lookup: finds this worker's caches."""

    name = "gloo"
    device = "cpu"  # of what is sent and received

    def __init__(self, host: str, lookup: Lookup, secret: bytes, timeout: float = 20.0) -> None:
        self._host = host
        self._lookup = lookup
        self._patience = timedelta(seconds=timeout)
        super().__init__(host, secret, timeout)

    def answer(self, peer: socket.socket, request_id: str) -> None:
        """See `Doorway.answer`."""
        try:
            store = dist.TCPStore(self._host, 0, 2, is_master=True, timeout=self._patience, wait_for_workers=False)
            peer.sendall(_PORT.pack(store.port))
            group = self._meet(store, SENDER)
            for head, part in outgoing_parts(self._lookup, request_id, self._timeout):
                for data in (bytearray(head), bytearray(part)):  # torch wants memory that it may write to
                    if data:
                        tensor = torch.frombuffer(data, dtype=torch.uint8).to(self.device)
                        group.send([tensor], RECEIVER, 0).wait()
            receive(peer, 1)  # the group must last until everything has arrived
        except RuntimeError as error:  # the way to say that the other side is gone
            raise TransferError(f"{self.name} failed ({first_line(error)}); try again") from error

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        """See `Transport.fetch`."""
        try:
            with self.ask(address, request_id) as peer:
                [port] = _PORT.unpack(receive(peer, _PORT.size).tobytes())
                host = address.rpartition(":")[0]
                store = dist.TCPStore(host, port, 2, is_master=False, timeout=self._patience, wait_for_workers=False)
                group = self._meet(store, RECEIVER)
                for number in range(len(sizes) + 1):
                    head = self._take(group, wire.FRAME_BYTES).tobytes()
                    size, checksum, is_error = expected_size(number, sizes, head)
                    yield checked(self._take(group, size), checksum, is_error)
                peer.sendall(b"\0")
        except OSError as error:
            raise self.explain(address, error) from error
        except RuntimeError as error:
            raise TransferError(f"{self.name} failed ({first_line(error)}); try again") from error

    def _meet(self, store: Any, rank: int) -> Any:
        """The group of two. gloo would listen where this machine's name leads to, which others may not reach."""
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._patience
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def _take(self, group: Any, size: int) -> Part:
        data = torch.empty(size, dtype=torch.uint8, device=self.device)
        if size:
            group.recv([data], SENDER, 0).wait()
        found: Part = data.cpu().numpy()
        return found


class NcclTransport(GlooTransport):
    """The same over NCCL, which carries GPU memory alone. Raises ConfigError where there is no CUDA."""

    name = "nccl"
    device = "cuda"

    def __init__(self, host: str, lookup: Lookup, secret: bytes, timeout: float = 20.0) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("--transport nccl needs CUDA, which is not there; choose --transport tcp or gloo")
        super().__init__(host, lookup, secret, timeout)

    def _meet(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._patience
        return dist.ProcessGroupNCCL(store, rank, 2, options)
