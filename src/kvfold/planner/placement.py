"""Which workers there are, and the link between them."""

import math
import re
from dataclasses import dataclass

from kvfold.planner.errors import PlacementError

_FORM = re.compile(r"\s*([a-z]+)\s*\(\s*([^()]*?)\s*\)\s*")
_REMEDY = "write colocated(workers=N) or disaggregated(prefill=P,decode=D)"


@dataclass(frozen=True)
class Placement:
    """`prefill` workers that read prompts and `decode` workers that generate, or `mixed` ones that do both (chunked
    prefill beside decoding, as one engine does it)."""

    mixed: int = 0
    prefill: int = 0
    decode: int = 0

    def __post_init__(self) -> None:
        if min(self.mixed, self.prefill, self.decode) < 0 or not self.workers:
            raise PlacementError(f"a placement needs workers; {_REMEDY}")
        if bool(self.prefill) != bool(self.decode) or (self.mixed and self.prefill):
            raise PlacementError(f"prefill workers need decode workers and the reverse; {_REMEDY}")

    @property
    def workers(self) -> int:
        return self.mixed + self.prefill + self.decode

    @property
    def options(self) -> str:
        """What tells `kvfold serve` so, and a space; nothing for a single engine."""
        if self.workers == 1:
            return ""
        return f"--prefill-workers {self.prefill} --decode-workers {self.decode or self.mixed} "

    def times(self, count: int) -> "Placement":
        """The same, `count` times over."""
        return Placement(self.mixed * count, self.prefill * count, self.decode * count)

    def __str__(self) -> str:
        if self.mixed:
            return f"colocated(workers={self.mixed})"
        return f"disaggregated(prefill={self.prefill},decode={self.decode})"


def parse_placement(text: str) -> Placement:
    """Reads what `str(placement)` writes. Raises PlacementError."""
    match = _FORM.fullmatch(text)
    names = {"colocated": ("workers",), "disaggregated": ("prefill", "decode")}
    if match is None or match[1] not in names:
        raise PlacementError(f"unknown placement {text!r}; {_REMEDY}")
    counts: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in match[2].split(","))):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or name not in names[match[1]] or name in counts:
            raise PlacementError(f"{part!r} has no place in {match[1]}(...); {_REMEDY}")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number[:9]) <= 10_000 or len(number) > 9:
            raise PlacementError(f"{part!r} is no number of workers; give 1 to 10,000")
        counts[name] = int(number)
    missing = [name for name in names[match[1]] if name not in counts]
    if missing:
        raise PlacementError(f"{text!r} does not say how many {missing[0]} workers; {_REMEDY}")
    return Placement(counts.get("workers", 0), counts.get("prefill", 0), counts.get("decode", 0))


@dataclass(frozen=True)
class Link:
    """Between any two workers. gbps: 10^9 bits per second, of each worker's own port in each direction; overhead:
    seconds per handover beside the bytes and the copying that the profile measured.

    first_token: whether the client has the first token when the prompt is read ("prefill"), as kvfold's own router
    gives it, or once the decode worker has pulled it with the pages ("pull").
    """

    gbps: float = 10.0
    overhead: float = 0.0
    first_token: str = "prefill"

    def __post_init__(self) -> None:
        if not self.gbps > 0:  # NaN too
            raise PlacementError(f"--link-gbps {self.gbps:g} carries nothing; give gigabits per second above 0")
        if not 0 <= self.overhead < math.inf:
            raise PlacementError(f"--link-overhead {self.overhead:g} is no time; give seconds, 0 or more")
        if self.first_token not in ("prefill", "pull"):
            raise PlacementError(f"--first-token {self.first_token!r} is unknown; give prefill or pull")

    def seconds(self, size: int) -> float:
        return self.overhead + 8 * size / (self.gbps * 1e9)
