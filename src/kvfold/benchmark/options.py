"""What a benchmark is asked to do, checked before any work."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvfold.benchmark.lengths import DEFAULT_INPUT, LengthRange
from kvfold.errors import ConfigError

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class TargetOptions:
    """Which server and how to ask it. kv: compression methods to compare (empty: the field is not sent)."""

    url: str
    model: str | None = None
    kv: tuple[str, ...] = ()
    api_key: str | None = None
    endpoint: Endpoint = "chat"
    ignore_eos: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"--timeout {self.timeout:g} waits for nothing; give seconds above 0")
        if len(set(self.kv)) < len(self.kv):
            raise ConfigError("the same --kv is given twice; name each method once")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key has characters that HTTP headers lack; check --api-key and KVFOLD_API_KEY")


@dataclass(frozen=True)
class WorkloadOptions:
    """Which requests arrive when.

    rate: requests per second, None for the trace's own times (without a trace: all at once). concurrency: most
    requests in flight. With all at once and a limit the load is a closed loop. first, requests: part of the trace.
    scale: factor of the trace's lengths. shared_prefix: leading tokens that all prompts share; it replaces what
    a trace says about shared blocks. Lengths are tokens.
    """

    requests: int = 100
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    trace: Path | None = None
    speed: float = 1.0
    first: int = 0
    scale: float = 1.0
    input_tokens: LengthRange | None = None
    output_tokens: LengthRange | None = None
    shared_prefix: int = 0
    dataset: Path | None = None
    seed: int = 0
    warmup: int = 0

    @property
    def closed_loop(self) -> bool:
        """Whether a request is sent because another ended, so that it has no time of its own to be late for."""
        own_times = self.trace is not None and self.rate is None
        return self.concurrency is not None and not own_times and (self.rate is None or math.isinf(self.rate))

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--requests", self.requests, 1),
            ("--concurrency", self.concurrency, 1),
            ("--from", self.first, 0),
            ("--shared-prefix", self.shared_prefix, 0),
            ("--warmup", self.warmup, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} is out of range; give at least {least}")
        for name, factor in (("--speed", self.speed), ("--scale", self.scale)):
            if not 0 < factor < math.inf:
                raise ConfigError(f"{name} {factor:g} is no factor; give a number above 0 (1 changes nothing)")
        if self.burstiness != 1 and (self.rate is None or math.isinf(self.rate)):
            raise ConfigError("--burstiness shapes the gaps of a finite --rate; give --rate R or leave it out")
        if self.trace is None:
            self._without_trace()
        else:
            self._with_trace()

    def _without_trace(self) -> None:
        for name, changed in (("--speed", self.speed != 1), ("--from", self.first), ("--scale", self.scale != 1)):
            if changed:
                raise ConfigError(f"{name} applies to a trace; give --trace FILE or leave {name} out")
        shortest = (self.input_tokens or DEFAULT_INPUT).low
        if self.shared_prefix >= shortest:
            raise ConfigError(
                f"--shared-prefix {self.shared_prefix} leaves nothing of prompts of {shortest} tokens; "
                "give fewer tokens than --input-tokens"
            )

    def _with_trace(self) -> None:
        if self.input_tokens is not None or self.output_tokens is not None:
            raise ConfigError("a trace has its own lengths; leave out --input-tokens and --output-tokens (see --scale)")
        if self.rate is not None and self.speed != 1:
            raise ConfigError("--rate replaces the trace's times, which --speed would scale; give one of the two")


@dataclass(frozen=True)
class Limits:
    """Latencies that a request must meet to count as goodput, in seconds (None: any)."""

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--ttft-limit", self.ttft), ("--tpot-limit", self.tpot)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} {value:g} is met by nothing; give seconds above 0")
