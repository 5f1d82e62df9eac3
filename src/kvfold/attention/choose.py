"""Which backend computes attention on this machine."""

import logging
import os
from functools import cache

from kvfold.attention.base import AttentionBackend
from kvfold.attention.cpu.backend import CpuBackend
from kvfold.attention.reference import ReferenceBackend
from kvfold.attention.triton import triton_backend
from kvfold.errors import ConfigError, KernelsUnavailable
from kvfold.native.library import VARIABLE as VARIABLE

NAMES = ("auto", "cpu", "cpu:KERNELS", "triton", "reference")

_log = logging.getLogger(__name__)


def choose_backend(name: str | None = None) -> AttentionBackend:
    """The backend of this name: `cpu` (compiled kernels, the best for this machine), `cpu:avx2` and the like (those
    kernels), `triton`, `reference` (torch), or `auto`: cpu where it was built, else the reference, which is said once.

    None: what the environment variable KVFOLD_BACKEND says, or auto. Raises ConfigError for other names and
    KernelsUnavailable where kernels were asked for that are not there.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    if name == "reference":
        return ReferenceBackend()
    if name == "triton":
        return triton_backend()
    if name == "auto":
        return _best()
    kind, _, kernels = name.partition(":")
    if kind != "cpu":
        raise ConfigError(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    return CpuBackend(kernels or None)


@cache
def _best() -> AttentionBackend:
    try:
        return CpuBackend()
    except KernelsUnavailable as error:
        _log.warning("attention runs in torch, several times slower: %s", error)
        return ReferenceBackend()
