"""What both sides of a call of the attention kernels agree on: structures, and formats as the kernels keep them."""

import ctypes
from collections.abc import Iterable
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache

from kvfold.kv.format import UNIT, PageFormat, Row, Scale
from kvfold.native.library import MOST_DIM, library

_SCALES = {Scale.STATIC: 0, Scale.TOKEN: 1, Scale.CHANNEL: 2, Scale.STEP: 3}


class Step(ctypes.Structure):
    """`kvfold_step` of attend.h, as all classes here mirror what it says; descriptions are there."""

    _fields_ = tuple((name, c_int64) for name in ("length", "first", "count"))


class Layer(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("page_bytes", "layer", "kv_heads", "group", "dim")),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("wide", c_int64),
        ("scale", c_double),
        ("window", c_int64),
        ("steps", c_void_p),
        ("count", c_int64),
        ("kernels", c_void_p),
    )


class SealedTables(ctypes.Structure):
    _fields_ = (("near", c_void_p), ("far", c_void_p), ("near_columns", c_int64), ("far_columns", c_int64))


class SealedCall(ctypes.Structure):
    _fields_ = (
        ("layer", Layer),
        *((name, c_int64) for name in ("exact", "sinks", "recent", "seal", "ring", "sunk")),
        *((name, c_void_p) for name in ("near_format", "far_formats", "tables")),
    )


class Numbers(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("layers", c_int64), ("heads", c_int64), ("half", c_int64))


class FrameInfo(ctypes.Structure):
    _fields_ = tuple((name, Numbers) for name in ("matrix", "scale", "index", "origin"))


class Tracks(ctypes.Structure):
    _fields_ = (("pages", c_void_p), ("rows", c_void_p), ("columns", c_int64), ("frames", c_void_p))


class WatchInfo(ctypes.Structure):
    _fields_ = (
        ("step", c_int64),
        ("power", c_int64),
        ("queries", c_void_p),
        ("count", c_int64),
        ("mass", c_void_p),
        ("widths", c_void_p),
    )


class StagedCall(ctypes.Structure):
    _fields_ = (
        ("layer", Layer),
        ("heads", c_int64),
        ("tracks", c_int64),
        *((name, c_void_p) for name in ("formats", "tables", "watches")),
        ("watched", c_int64),
    )


STRUCTURES = (Step, Layer, SealedTables, SealedCall, FrameInfo, Tracks, WatchInfo, StagedCall)


def supported(fmt: PageFormat) -> bool:
    """Whether the kernels know this format. They do not keep units of odd sizes."""
    if fmt.head_dim > MOST_DIM:
        return False
    return fmt.block <= 256 and (fmt.block % UNIT == 0 or UNIT % fmt.block == 0)


def rounded_by_reference(formats: Iterable[PageFormat]) -> bool:
    """Whether the reference rounds queries and weights of one of them, as HACK does: there it computes other numbers
    than the kernels, and who computes must not depend on how many tokens a step has."""
    return any(fmt.key.sums and fmt.value.sums for fmt in formats)


@cache
def native_format(fmt: PageFormat) -> int:
    """The format as the kernels keep it (for good: there are as many as layouts in use have)."""
    words = [fmt.page_bytes, fmt.head_dim, fmt.block, *_row_words(fmt.key), *_row_words(fmt.value)]
    pointer: int = library().kvfold_format((c_int32 * len(words))(*words))
    made = [library().kvfold_format_bytes(pointer, which) for which in (0, 1)]
    assert made == [fmt.block_bytes, fmt.capacity], (made, fmt)
    return pointer


def _row_words(row: Row) -> list[int]:
    groups = row.kept // (row.group or row.kept) if row.kept else 1
    return [_SCALES[row.scale], groups, int(row.sums), row.kept, *row.widths]
