"""How a cluster runs, apart from its engines."""

from dataclasses import dataclass
from typing import Literal

from kvfold.errors import ConfigError

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
TRANSPORTS = ("tcp", "ray", "gloo", "nccl")


@dataclass(frozen=True)
class ClusterOptions:
    """prefill, decode: workers of each role; without readers every worker reads the prompts that it answers. transport:
    who carries KV caches. ray_address: of a Ray cluster that runs already; None starts one on this machine and stops it
    in the end. threads: of each worker; None: this machine's cores shared out. link_gbps: limits what a worker sends
    over TCP. stall_seconds: silence after which a transfer or a worker is given up. attempts: times that a request is
    begun again after a worker or transfer was lost.

    Raises ConfigError for values out of range.
    """

    prefill: int = 1
    decode: int = 1
    transport: str = "tcp"
    ray_address: str | None = None
    threads: int | None = None
    link_gbps: float | None = None
    stall_seconds: float = 20.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.prefill < 0:
            raise ConfigError(f"--prefill-workers {self.prefill} is out of range; give 0 or more")
        if self.decode < 1:
            raise ConfigError(f"--decode-workers {self.decode} is out of range; give at least 1")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"--transport {self.transport!r} is unknown; choose one of {', '.join(TRANSPORTS)}")
        if self.link_gbps is not None and not 0 < self.link_gbps < float("inf"):
            raise ConfigError(f"--link-gbps {self.link_gbps} is out of range; give a rate above 0, or leave it out")
        if self.link_gbps is not None and self.transport != "tcp":
            raise ConfigError("--link-gbps limits TCP alone; choose --transport tcp, or leave it out")
        if not 0 < self.stall_seconds < float("inf"):
            raise ConfigError(f"--stall-seconds {self.stall_seconds} is out of range; give a time above 0")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads} is out of range; give a positive integer")

    @property
    def workers(self) -> int:
        return self.prefill + self.decode

    @property
    def gpus(self) -> int:
        """Of each worker. NCCL wants one for each of those that meet."""
        return int(self.transport == "nccl")
