"""The profile: what was measured, on what, and the latency model that follows, as one JSON file.

It holds the layouts too, so that simulating needs neither the model nor its calibration.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from kvfold.config.files import write_atomically
from kvfold.config.method import parse_method
from kvfold.errors import ConfigError
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.planner.errors import ProfileError
from kvfold.planner.fit import Point
from kvfold.planner.latency import LatencyModel, TransferCost
from kvfold.planner.pages import Layout, PageArithmetic

VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Where a profile was measured. threads: that computed; clock: "wall", or "cpu" for the processor time of one
    thread; kvfold, torch: versions."""

    processor: str
    threads: int
    clock: str
    kvfold: str
    torch: str


@dataclass(frozen=True)
class EngineLimits:
    """The engine's own limits while it was measured; a simulation takes them over."""

    chunk: int = 512
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    prefix_caching: bool = True
    prefix_block: int = 512


@dataclass(frozen=True)
class MethodProfile:
    """One method's latency model, page layout (one of the two is None) and the points they come from.

    uneven: heads have budgets of their own. knee and costs are in `latency`.
    """

    method: str
    latency: LatencyModel
    transfer: TransferCost
    sealed: CacheLayout | None
    staged: StagedLayout | None
    uneven: bool = False
    points: tuple[Point, ...] = ()

    @property
    def layout(self) -> Layout:
        layout = self.sealed or self.staged
        if layout is None:
            raise ProfileError(f"the profile has no page layout of {self.method!r}; run `kvfold profile` again")
        return layout

    @cached_property
    def _arithmetic(self) -> dict[int, PageArithmetic]:
        return {}

    def pages(self, chunk: int) -> PageArithmetic:
        """One for all simulations: what it remembers is worth more than what it computes."""
        return self._arithmetic.setdefault(chunk, PageArithmetic(self.layout, chunk, self.uneven))


@dataclass(frozen=True)
class Profile:
    """dtype: computed in; kv_dtype: of uncompressed keys and values, whatever "auto" was; weights: how they are packed.
    positions: most tokens of a sequence that the model takes."""

    version: int
    model: str
    dtype: str
    kv_dtype: str
    weights: str
    positions: int
    machine: Machine
    limits: EngineLimits
    methods: tuple[MethodProfile, ...]

    def of(self, method: str) -> MethodProfile:
        """What was measured of a method, however its name is spaced. Raises ConfigError, ProfileError."""
        wanted = parse_method(method)
        for each in self.methods:
            if parse_method(each.method) == wanted:
                return each
        known = ", ".join(each.method for each in self.methods)
        raise ProfileError(
            f"the profile has no method {method!r}, only {known}; choose one of these or run "
            f"`kvfold profile --kv '{method}'`"
        )


class _Version(msgspec.Struct):
    version: int


def check_out(path: Path) -> None:
    """Raises ProfileError where a profile could not be written: before minutes of measuring, not after."""
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise ProfileError(f"cannot write the profile {path}: {what}; give another --out")
    if not os.access(path.parent, os.W_OK):
        raise ProfileError(f"cannot write the profile {path}: its folder is read-only; give another --out")


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile, whole or not at all. Raises ProfileError."""
    try:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(profile), indent=1))
    except OSError as error:
        raise ProfileError(f"cannot write the profile {path}: {error.strerror}; give another --out") from error


def load_profile(path: Path) -> Profile:
    """Raises ProfileError for a file that is not there, no profile, or one of another version."""
    remedy = "give a file that `kvfold profile --out` wrote"
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ProfileError(f"cannot read the profile {path}: {reason}; {remedy}") from error
    try:
        version = msgspec.json.decode(data, type=_Version).version
    except msgspec.DecodeError as error:
        raise ProfileError(f"{path} is no profile ({error}); {remedy}") from error
    if version != VERSION:
        raise ProfileError(
            f"the profile {path} is of version {version}, this kvfold reads version {VERSION}; "
            "run `kvfold profile` again"
        )
    try:
        profile = msgspec.json.decode(data, type=Profile)
        for each in profile.methods:
            parse_method(each.method)
            _check(each)
    except (msgspec.DecodeError, ConfigError, ProfileError) as error:
        raise ProfileError(f"the profile {path} is damaged ({error}); run `kvfold profile` again") from error
    if not profile.methods:
        raise ProfileError(f"the profile {path} holds no method; run `kvfold profile` again")
    return profile


def _check(method: MethodProfile) -> None:
    """A cost below zero would make time run backwards; JSON itself has neither NaN nor infinity."""
    latency, transfer = method.latency, method.transfer
    decodes = [latency.decode] if latency.decode_above is None else [latency.decode, latency.decode_above]
    costs = [latency.prefill.fixed, latency.prefill.per_token, latency.prefill.per_square, transfer.overhead]
    costs += [cost for each in decodes for cost in (each.fixed, each.per_byte, each.per_sequence)]
    if min(costs) < 0 or transfer.bytes_per_second <= 0:
        raise ProfileError(f"negative costs of {method.method!r}")
    if (method.sealed is None) == (method.staged is None):
        raise ProfileError(f"no page layout of {method.method!r}")
