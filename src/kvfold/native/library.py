"""The compiled kernels: finding the library, and the set of instructions to be used."""

import ctypes
import os
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvfold.errors import KernelsUnavailable

MOST_DIM = 256  # of a head: kMaxDim of kernels.h
VARIABLE = "KVFOLD_BACKEND"  # what computes attention; after a colon, the instructions of all kernels
VERSION = 3  # of the calls; the library has the same number, or it was built from other sources


@cache
def library() -> Any:
    """The loaded library. Raises KernelsUnavailable where it was not built or was built from other sources."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        raise KernelsUnavailable("the kernels were not built; install kvfold again where there is a C++ compiler")
    _share_threads()
    try:
        loaded = ctypes.CDLL(str(found[0]))
        version = loaded.kvfold_version()
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{found[0].name} cannot be loaded ({error}); install kvfold again") from error
    if version != VERSION:
        raise KernelsUnavailable(f"{found[0].name} is of another version of kvfold; install kvfold again")
    loaded.kvfold_kernels.argtypes, loaded.kvfold_kernels.restype = [c_char_p], c_void_p
    loaded.kvfold_kernels_name.argtypes, loaded.kvfold_kernels_name.restype = [c_void_p], c_char_p
    loaded.kvfold_format.argtypes, loaded.kvfold_format.restype = [c_void_p], c_void_p
    loaded.kvfold_format_bytes.argtypes, loaded.kvfold_format_bytes.restype = [c_void_p, c_int64], c_int64
    loaded.kvfold_struct_size.argtypes, loaded.kvfold_struct_size.restype = [c_int64], c_int64
    loaded.kvfold_attend_sealed.argtypes, loaded.kvfold_attend_sealed.restype = [c_void_p], None
    loaded.kvfold_attend_staged.argtypes, loaded.kvfold_attend_staged.restype = [c_void_p], None
    loaded.kvfold_turn_heads.argtypes, loaded.kvfold_turn_heads.restype = [c_void_p], None
    loaded.kvfold_multiply.argtypes, loaded.kvfold_multiply.restype = [c_void_p], None
    loaded.kvfold_run.argtypes, loaded.kvfold_run.restype = [c_void_p, c_int64, c_void_p], None
    return loaded


def find_kernels(name: str | None = None) -> int:
    """The kernels for one set of instructions (`avx512-vnni-bf16`, `avx512-vnni`, `avx2`, `portable`); None: those that
    KVFOLD_BACKEND=cpu:NAME names, or the best.

    Raises KernelsUnavailable where the library is not there or the machine lacks the instructions.
    """
    name = name or os.environ.get(VARIABLE, "").partition(":")[2] or None
    found: int | None = library().kvfold_kernels(None if name is None else name.encode())
    if not found:
        raise KernelsUnavailable(f"this machine has no {name} instructions; leave the choice to kvfold")
    return found


def kernels_name(kernels: int) -> str:
    """The instructions that `find_kernels` found."""
    name: bytes = library().kvfold_kernels_name(kernels)
    return name.decode()


def _share_threads() -> None:
    """Makes torch's OpenMP the one that the kernels find: a second pool of threads would spin against the first."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
