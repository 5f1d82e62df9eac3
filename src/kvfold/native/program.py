"""A list of compiled calls that runs as one, without Python in between."""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_double, c_int64, c_void_p
from enum import IntEnum
from typing import Any

from kvfold.native.library import library

_timers: list[Any] = []


class Kind(IntEnum):
    """What a call is of; the structure of each is its caller's."""

    LINEAR = 0
    HEADS = 1
    ATTENTION = 2


class _Op(ctypes.Structure):
    """`kvfold_op` of program.cpp."""

    _fields_ = (("kind", c_int64), ("call", c_void_p))


class Program:
    """Keeps the calls' structures; what they point to is the caller's to keep."""

    def __init__(self, calls: Sequence[tuple[Kind, ctypes.Structure]]) -> None:
        self._calls = [call for _, call in calls]
        self._ops = (_Op * len(calls))(*(_Op(kind, ctypes.addressof(call)) for kind, call in calls))

    def run(self) -> None:
        library().kvfold_run(self._ops, len(self._ops), _timers[-1] if _timers else None)


@contextmanager
def timing() -> Iterator[Mapping[Kind, float]]:
    """While it lasts, programs add up the seconds that each kind of call takes; to be read at the end."""
    seconds = (c_double * len(Kind))()
    found: dict[Kind, float] = {}
    _timers.append(seconds)
    try:
        yield found
    finally:
        _timers.pop()
        found |= {kind: seconds[kind] for kind in Kind}
