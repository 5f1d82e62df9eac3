"""What every rank loads before it meets the others."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvfold.config.progress import SILENT, Progress
from kvfold.engine.lane import MethodLane, pack_lanes
from kvfold.engine.llm import prepare_lane, resolve_dtypes
from kvfold.errors import ConfigError
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model
from kvfold.model.packed import weight_bits
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.fitting import check_wire_bits, positional_layout, staged_message
from kvfold.parallel.identity import Identity
from kvfold.parallel.split import VARIANTS, Variant, shared_heads


@dataclass(frozen=True)
class ParallelConfig:
    """One worker of several ranks, as all of them are told. Fields as in `LLM`; kv_memory: bytes of each rank.

    wire_bits: 16 sends numbers with the bits that uncompressed elements of the cache have, 4 to 8 as integers with a
    step per row, which loses a little; what is sealed travels as it is stored either way. timeout: seconds after
    which a silent rank counts as lost.
    Raises ParallelError or ConfigError for values out of range.
    """

    ranks: int
    model: str = "smollm2-135m"
    kv: str = "none"
    kv_memory: int = 2**30
    dtype: str = "auto"
    kv_dtype: str = "auto"
    weights: str = "auto"
    calibration: str | None = None
    variant: Variant = "ring"
    wire_bits: int = 16
    timeout: float = 120.0
    backend: str = "gloo"

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ParallelError(f"{self.ranks} ranks cannot do anything; give --sequence-parallel 1 or more")
        if self.variant not in VARIANTS:
            raise ParallelError(f"variant {self.variant!r} is unknown; choose {' or '.join(VARIANTS)}")
        if not 0 < self.timeout < float("inf"):
            raise ParallelError(f"timeout={self.timeout} is out of range; give seconds above 0")
        if self.backend not in ("gloo", "nccl"):
            raise ParallelError(f"backend {self.backend!r} is unknown; choose gloo or nccl")
        check_wire_bits(self.wire_bits)
        build_method(self.kv)
        weight_bits(self.weights)

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Loaded:
    """One rank's model and lane."""

    model: LoadedModel
    lane: MethodLane
    identity: Identity
    raw_bits: int


def load(config: ParallelConfig, progress: Progress = SILENT) -> Loaded:
    """Loads model and method as `LLM` does. Raises what that raises, and ParallelError for staged methods."""
    method = build_method(config.kv)
    compute, raw_bits = resolve_dtypes(config.dtype, config.kv_dtype)
    if method.staged or not method.codec.positional:
        raise ParallelError(staged_message(config.kv))
    model = load_model(config.model, dtype=compute, progress=progress)
    path = None if config.calibration is None else Path(config.calibration)
    lane, _ = prepare_lane(model, config.kv, raw_bits, path, progress)
    shared_heads(positional_layout(lane).kv_heads, config.variant, config.ranks)
    [lane] = pack_lanes(model.decoder, [lane], weight_bits(config.weights))
    numbers = f"{compute}, weights {config.weights}, cache {raw_bits} bits".removeprefix("torch.")
    exchange = f"{config.variant}, {config.wire_bits} bits"
    identity = Identity(model.fingerprint, config.kv, lane.calibration, numbers, exchange)
    return Loaded(model, lane, identity, raw_bits)


def config_from_json(text: str) -> ParallelConfig:
    """Raises ConfigError for text that `as_json` did not write."""
    try:
        return ParallelConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("this is no description of ranks; it comes from another version of kvfold") from error


@contextmanager
def shared_threads(ranks_here: int) -> Iterator[None]:
    """This machine's processors are shared among the ranks on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // ranks_here))
    try:
        yield
    finally:
        torch.set_num_threads(before)
