"""What a suite is asked for, apart from the model, the methods and where the results go."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import CalibrationError, ConfigError

SHORTEST = 64
"""Tokens of context; less has no room for windows, let alone for something to compress."""


@dataclass(frozen=True)
class SuiteSettings:
    """What the figures depend on.

    lengths: of contexts, in tokens. samples: per task and length. continuation: tokens that the text task predicts.
    query_aware: methods compress when they have read the question too. calibration: a file or a folder with one
    (None: the model's own). dtype: as in `LLM`. Raises ConfigError for values out of range.
    """

    lengths: tuple[int, ...] = (2048,)
    samples: int = 10
    seed: int = 0
    continuation: int = 256
    query_aware: bool = False
    calibration: Path | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("no context length is given; give, say, --context 2048")
        for length in self.lengths:
            if length < SHORTEST:
                raise ConfigError(f"--context {length} is too short to compress; give at least {SHORTEST} tokens")
        for name, value in (("samples", self.samples), ("continuation", self.continuation)):
            if value < 1:
                raise ConfigError(f"--{name} {value} measures nothing; give at least 1")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    def described(self) -> dict[str, str]:
        """The settings as a manifest keeps them; a calibration by its content."""
        return {
            "context": ",".join(map(str, self.lengths)),
            "samples": str(self.samples),
            "seed": str(self.seed),
            "continuation": str(self.continuation),
            "query_aware": str(self.query_aware),
            "dtype": self.dtype,
            "calibration": "default" if self.calibration is None else _digest(self.calibration),
        }


def check_budgets(budgets: Sequence[float]) -> list[float]:
    """Budgets in bits per number of the dense cache, ascending, each once. Raises ConfigError for impossible ones."""
    for bits in budgets:
        if not (math.isfinite(bits) and 0 < bits <= 16):
            raise ConfigError(f"--budgets {bits:g} is out of range; give bits above 0 and up to 16, such as 2,3,4,6")
    if not budgets:
        raise ConfigError("no budget is given; give, say, --budgets 2,3,4,6")
    return sorted(set(budgets))


def _digest(path: Path) -> str:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}; run `kvfold calibrate` first") from error
