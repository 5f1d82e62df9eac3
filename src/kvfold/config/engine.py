"""How an engine runs, apart from the model and the method."""

from dataclasses import dataclass
from numbers import Integral

from kvfold.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """kv_memory: bytes for KV pages. chunk: most prompt tokens of one request in one step. max_batch_tokens: most
    tokens of all requests in one step. max_sequences: most running sequences. prefix_block: every how many prompt
    tokens a snapshot is kept for other requests (with prefix_caching). seed: for requests without their own.

    Raises ConfigError for values out of range.
    """

    kv_memory: int = 2**30
    chunk: int = 512
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    prefix_caching: bool = True
    prefix_block: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_memory", "chunk", "max_batch_tokens", "max_sequences", "prefix_block"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ConfigError(f"{name}={value!r} is out of range; give a positive integer")
        if not _is_integer(self.seed):
            raise ConfigError(f"seed={self.seed!r} is not allowed; give an integer")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
