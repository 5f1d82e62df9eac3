"""What the C library keeps of freed memory."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Gives pages of freed tensors back to the system: glibc keeps those between others that are still in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
