"""What leaves one worker arrives at another, or an error does, in time."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.cluster.collective import GlooTransport, NcclTransport
from kvfold.cluster.tcp import Link, TcpTransport
from kvfold.cluster.transport import Transport
from kvfold.engine.handover import Outgoing
from kvfold.errors import ConfigError, TransferError
from kvfold.kv import wire
from tests.engine.handing import step_until
from tests.engine.tiny import Tiny, greedy, tokens

GetTiny = Callable[[str], Tiny]
SECRET = bytes(range(32))
KINDS = {"tcp": TcpTransport, "gloo": GlooTransport}


@pytest.fixture(scope="module")
def outgoing(tiny: GetTiny) -> Outgoing:
    engine = tiny("llama").engine("zeroc(bits=4,recent=16)")
    engine.add_request(tokens(200, 1), greedy(8), request_id="r", handover=True)
    step_until(engine, "r")
    return engine.handovers.outbox["r"]


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest, outgoing: Outgoing) -> Iterator[tuple[Transport, Transport]]:
    """A sender that has the cache "r", and a receiver."""
    kind = KINDS[request.param]
    sender = kind("127.0.0.1", {"r": outgoing}.get, SECRET, timeout=2.0)
    receiver = kind("127.0.0.1", {}.get, SECRET, timeout=2.0)
    with closing(sender), closing(receiver):
        yield sender, receiver


def sizes(outgoing: Outgoing) -> list[int]:
    return [outgoing.extents.most(layer) for layer in range(outgoing.extents.layers)]


def test_parts_arrive_as_they_were_sent(pair: tuple[Transport, Transport], outgoing: Outgoing) -> None:
    sender, receiver = pair
    for _ in range(2):
        found = list(receiver.fetch(sender.address, "r", sizes(outgoing)))
        assert [part.tobytes() for part in found] == [outgoing.part(n, 0).tobytes() for n in range(outgoing.parts)]


def test_a_cache_that_is_not_there_is_an_error_at_once(pair: tuple[Transport, Transport], outgoing: Outgoing) -> None:
    sender, receiver = pair
    with pytest.raises(TransferError, match="no longer there"):
        list(receiver.fetch(sender.address, "other", sizes(outgoing)))


def test_other_sizes_are_refused(pair: tuple[Transport, Transport], outgoing: Outgoing) -> None:
    sender, receiver = pair
    with pytest.raises(TransferError, match="in the place of part 0"):
        list(receiver.fetch(sender.address, "r", [size // 2 for size in sizes(outgoing)]))


def test_nobody_there(pair: tuple[Transport, Transport], outgoing: Outgoing) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(TransferError, match="failed"):
        list(pair[1].fetch(address, "r", sizes(outgoing)))


def test_parts_are_sent_as_soon_as_they_are_computed(tiny: GetTiny) -> None:
    """The first layer is there before the second one is known to be complete."""
    engine = tiny("llama").engine("none")
    engine.add_request(tokens(60, 1), greedy(8), request_id="r", handover=True)
    step_until(engine, "r")
    done = engine.handovers.outbox["r"]
    slow = Outgoing("r", done.header, done.tables, engine.memory.pool)
    sender = TcpTransport("127.0.0.1", {"r": slow}.get, SECRET, timeout=5.0)
    with closing(sender):
        parts = sender.fetch(sender.address, "r", sizes(done))
        slow.computed(1)
        assert next(parts).tobytes() == done.part(0, 0).tobytes()
        threading.Timer(0.05, slow.computed, [2]).start()
        assert next(parts).tobytes() == done.part(1, 0).tobytes()
        slow.finish(wire.Tail(b"", [[1]]))
        assert next(parts).tobytes() == wire.msgspec.msgpack.encode(wire.Tail(b"", [[1]]))


def test_silence_is_given_up(tiny: GetTiny, outgoing: Outgoing) -> None:
    """A part that is never computed, and a worker that says nothing at all."""
    stuck = Outgoing("r", outgoing.header, outgoing.tables, outgoing._pool)
    sender = TcpTransport("127.0.0.1", {"r": stuck}.get, SECRET, timeout=0.2)
    with closing(sender), pytest.raises(TransferError, match=r"not computed within|silent"):
        list(sender.fetch(sender.address, "r", sizes(outgoing)))
    with socket.create_server(("127.0.0.1", 0)) as mute, closing(sender):
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(TransferError, match="silent"):
            list(sender.fetch(address, "r", sizes(outgoing)))


def test_strangers_get_nothing(outgoing: Outgoing) -> None:
    sender = TcpTransport("127.0.0.1", {"r": outgoing}.get, SECRET, timeout=2.0)
    stranger = TcpTransport("127.0.0.1", {}.get, bytes(32), timeout=2.0)
    with closing(sender), closing(stranger), pytest.raises(TransferError, match="ended the connection"):
        list(stranger.fetch(sender.address, "r", sizes(outgoing)))


@settings(max_examples=60)
@given(data=st.data())
def test_any_damaged_byte_is_noticed(outgoing: Outgoing, data: st.DataObject) -> None:
    """Of the header with its frame, and of a part with its frame."""
    header = bytearray(wire.pack(wire.HEADER, outgoing.header))
    at, flip = data.draw(st.integers(0, len(header) - 1)), data.draw(st.integers(1, 255))
    header[at] ^= flip
    with pytest.raises(TransferError):
        wire.unpack_header(bytes(header))
    body = outgoing.part(0, 0).copy()
    frame = wire.frame(0, body)
    body[data.draw(st.integers(0, len(body) - 1))] ^= flip
    with pytest.raises(TransferError, match="damaged"):
        wire.check(body, wire.read_frame(frame)[2])


def test_the_rate_is_kept() -> None:
    """A line of 8 Mbit/s is busy for a tenth of a second with 100,000 bytes, whoever sends them."""
    link = Link(0.008)
    threads = [threading.Thread(target=lambda: [link.wait(1000) for _ in range(50)]) for _ in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.099


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_nccl_without_cuda_names_what_to_choose() -> None:
    with pytest.raises(ConfigError, match="choose --transport tcp or gloo"):
        NcclTransport("127.0.0.1", {}.get, SECRET)
