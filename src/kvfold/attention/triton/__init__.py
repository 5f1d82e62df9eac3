"""Attention over compressed pages on a GPU, in Triton; in Triton's interpreter it runs on the CPU, for tests.

Nothing here imports Triton before `triton_backend` is called.
"""

from kvfold.attention.base import AttentionBackend
from kvfold.errors import ConfigError


def triton_backend() -> AttentionBackend:
    """The backend. Raises ConfigError where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the triton backend needs the package triton; install it (pip install triton) or use the reference backend"
        ) from error
    from kvfold.attention.triton.backend import TritonBackend

    return TritonBackend()
