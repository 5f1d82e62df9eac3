"""Sizes of programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Sizes of one program: rows of queries (times heads of a group), keys at once, warps and pipeline stages.

    programs: how many there should be at least, for the choice of the number of splits. plane_...: the same for codes
    of one width in decoding, where each warp wants 128 keys.
    """

    rows: int = 16
    keys: int = 128
    warps: int = 4
    stages: int = 2
    programs: int = 1024
    most_splits: int = 64
    plane_keys: int = 256
    plane_warps: int = 2
    plane_stages: int = 2

    def queries(self, group: int) -> int:
        """Queries of one tile."""
        return self.padded(group) // group

    def padded(self, group: int) -> int:
        return max(self.rows, 1 << (group - 1).bit_length())


DECODE = Tuning()
PREFILL = Tuning(rows=64, keys=64, warps=8, stages=2)
