"""How a sequence's cache crosses from one worker to another: a header, one part per layer, and a tail.

    header   what it is (version, model, method, calibration, layout) and how long: enough to make room for it
    layer l  the bytes in use of the layer's pages, page after page, recent rows packed (`Extents`)
    tail     what a staged sequence holds beside its pages, and the tokens that were sampled

What arrives is what was stored, bit for bit. Each part travels in a frame: magic, version, number, size and
CRC-32, in 20 bytes.
"""

import struct
import zlib
from typing import Any

import msgspec
import numpy as np

from kvfold.errors import TransferError
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables

VERSION = 2
HEADER = 0xFFFF  # the header's number; layers count from 0, and the tail's follows the last layer's
ERROR = 0xFFFE  # instead of a part: a sentence that says why there is none
MOST_TAIL = 2**30
_FRAME = struct.Struct("<4sHHQI")
_MAGIC = b"KVFW"
FRAME_BYTES = _FRAME.size


class Identity(msgspec.Struct, frozen=True):
    """What the bytes mean, as digests: weights and config of the model, the method with its parameters, the
    calibration (empty where the method needs none), formats and boundaries of the cache."""

    model: str
    method: str
    calibration: str
    layout: str

    def check(self, other: "Identity") -> None:
        """Raises TransferError where pages of `other` cannot be attended to here."""
        for name in ("model", "method", "calibration", "layout"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise TransferError(
                    f"the cache that arrives has another {name} ({theirs[:24]!r}) than this worker ({ours[:24]!r}); "
                    "start all workers with the same options"
                )


class Header(msgspec.Struct, frozen=True):
    """One cache of `length` tokens. context, rows: of a staged one, rows int64 [tracks, heads] as bytes."""

    identity: Identity
    length: int
    context: int | None = None
    rows: bytes = b""


class Tail(msgspec.Struct, frozen=True):
    """state: `staged_state` of a staged cache. outputs: token ids of every completion so far, None for those that have
    ended."""

    state: bytes
    outputs: list[list[int] | None]


def header_of(identity: Identity, tables: PageTables | StagedTables, length: int) -> Header:
    """The header of a cache that holds `length` tokens, or will when the step that runs is done."""
    if isinstance(tables, StagedTables):
        return Header(identity, length, tables.context, tables.rows.tobytes())
    return Header(identity, length)


def make_room(pool: PagePool, layout: CacheLayout | StagedLayout, header: Header) -> PageTables | StagedTables:
    """Tables with pages for a cache that is to come. Raises PoolExhausted, and TransferError where it cannot be."""
    if isinstance(layout, CacheLayout):
        positional = PageTables(layout)
        positional.take(pool, header.length)
        return positional
    staged = StagedTables(layout, header.context or 0)
    rows = np.frombuffer(header.rows, np.int64)
    if rows.size != staged.rows.size:
        raise TransferError("the header's rows are not those of this layout; start all workers with the same version")
    staged.rows[:] = rows.reshape(staged.rows.shape)
    staged.take(pool, header.length)
    return staged


def frame(number: int, data: Any) -> bytes:
    """What goes before a part on its way. data: anything with a buffer of bytes."""
    return _FRAME.pack(_MAGIC, VERSION, number, len(data), zlib.crc32(data))


def read_frame(data: bytes) -> tuple[int, int, int]:
    """Number, size and checksum of the part that follows. Raises TransferError for anything else."""
    magic, version, number, size, checksum = _FRAME.unpack(data)
    if magic != _MAGIC:
        raise TransferError("what arrives is no KV cache; check the address of the worker")
    if version != VERSION:
        raise TransferError(f"the KV cache that arrives has format {version}, this kvfold reads {VERSION}; update both")
    return number, size, checksum


def check(data: Any, checksum: int) -> None:
    """Raises TransferError where the bytes are not those that were sent."""
    if zlib.crc32(data) != checksum:
        raise TransferError("a part of the KV cache was damaged on its way; it is sent again")


def pack(number: int, message: Any) -> bytes:
    """A header or tail with its frame."""
    data = msgspec.msgpack.encode(message)
    return frame(number, data) + data


def unpack_header(data: bytes) -> Header:
    """Raises TransferError for anything but a whole header."""
    number, size, checksum = read_frame(data[:FRAME_BYTES])
    body = data[FRAME_BYTES:]
    check(body, checksum)
    if number != HEADER or size != len(body):
        raise TransferError("a KV cache begins with its header; update both workers")
    return msgspec.msgpack.decode(body, type=Header)
