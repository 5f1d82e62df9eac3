"""How many tokens requests have: drawn, scaled, and cut to what the model takes."""

import math
from dataclasses import dataclass
from random import Random

from kvfold.errors import ConfigError


@dataclass(frozen=True)
class LengthRange:
    """Token counts drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: Random) -> int:
        """One token count."""
        return rng.randint(self.low, self.high)


DEFAULT_INPUT = LengthRange(512, 512)
DEFAULT_OUTPUT = LengthRange(128, 128)


def parse_lengths(text: str, option: str) -> LengthRange:
    """`"128"` (always 128) or `"64:256"`. Raises ConfigError naming `option`."""
    low, colon, high = text.partition(":")
    try:
        lengths = LengthRange(int(low), int(high if colon else low))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no length; give tokens (128) or a range (64:256)") from None
    if not 1 <= lengths.low <= lengths.high:
        raise ConfigError(f"{option} {text!r} is no range of tokens; give LOW:HIGH with 1 <= LOW <= HIGH")
    return lengths


def scaled(tokens: int, scale: float) -> int:
    """`tokens` times `scale`, rounded up: a request never vanishes."""
    return max(1, math.ceil(tokens * scale))


def fit_context(input_tokens: int, output_tokens: int, context: int | None) -> tuple[int, int]:
    """Lengths that fit a context of `context` tokens together (None: unknown, unchanged).

    The prompt is cut first, as a service would truncate it; the output only where it alone exceeds the context.
    Raises ConfigError if the context has no room for one token of each.
    """
    if context is None:
        return input_tokens, output_tokens
    if context < 2:
        raise ConfigError("the model's context has no room for a prompt and an answer; serve it with a longer one")
    output_tokens = min(output_tokens, context - 1)
    return min(input_tokens, context - output_tokens), output_tokens
