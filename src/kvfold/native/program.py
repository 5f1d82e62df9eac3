"""A list of compiled calls that runs as one, without Python in between."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from enum import IntEnum

from kvfold.native.library import library


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
        library().kvfold_run(self._ops, len(self._ops))
