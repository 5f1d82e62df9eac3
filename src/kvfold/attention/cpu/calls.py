"""What both sides of a call of the attention kernels agree on: structures, and formats as the kernels keep them."""

import ctypes
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache

from kvfold.kv.format import UNIT, PageFormat, Row, Scale
from kvfold.native.library import library

_SCALES = {Scale.STATIC: 0, Scale.TOKEN: 1, Scale.CHANNEL: 2, Scale.STEP: 3}


class StepInfo(ctypes.Structure):
    """`kvfold_step` of attend.h."""

    _fields_ = (
        ("near", c_void_p),
        ("far", c_void_p),
        ("near_columns", c_int64),
        ("far_columns", c_int64),
        ("length", c_int64),
        ("first", c_int64),
        ("count", c_int64),
    )


class LayerCall(ctypes.Structure):
    """`kvfold_layer` of attend.h."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("page_bytes", "layer", "kv_heads", "group", "dim")),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("wide", c_int64),
        ("scale", c_double),
        *((name, c_int64) for name in ("exact", "sinks", "recent", "seal", "ring", "window", "sunk")),
        ("near_format", c_void_p),
        ("far_formats", c_void_p),
        ("steps", c_void_p),
        ("count", c_int64),
        ("kernels", c_void_p),
    )


def supported(fmt: PageFormat) -> bool:
    """Whether the kernels know this format. They do not keep sums of codes, nor units of another size."""
    if fmt.key.sums or fmt.value.sums or fmt.head_dim > 256:
        return False
    if fmt.block == 1:
        return all(row.raw == row.kept for row in (fmt.key, fmt.value))
    return fmt.block % UNIT == 0 and fmt.block <= 256


@cache
def native_format(fmt: PageFormat) -> int:
    """The format as the kernels keep it (for good: there are as many as layouts in use have)."""
    words = [fmt.page_bytes, fmt.head_dim, fmt.block, *_row_words(fmt.key), *_row_words(fmt.value)]
    pointer: int = library().kvfold_format((c_int32 * len(words))(*words))
    made = [library().kvfold_format_bytes(pointer, which) for which in (0, 1)]
    assert made == [fmt.block_bytes, fmt.capacity], (made, fmt)
    return pointer


def _row_words(row: Row) -> list[int]:
    return [_SCALES[row.scale], row.kept // (row.group or row.kept) if row.kept else 1, row.kept, *row.widths]
