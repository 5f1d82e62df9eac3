"""Sizes in bytes, as people write and read them."""

import re
from fractions import Fraction

from kvfold.errors import ConfigError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(i?)(b?))", re.IGNORECASE)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_REMEDY = "write a size such as '1GiB', '512MiB', '1.5GB' or a whole number of bytes"


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes, at least 1; a fraction of a byte is dropped.

    `KiB MiB GiB TiB` are powers of 1024, `KB MB GB TB` powers of 1000; a lone `K M G T` means the power of
    1024, as it does in containers and virtual machines. Case does not count; no unit means bytes.

    Raises:
        ConfigError: not a size, or less than one byte.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"{size!r} is not a size in bytes: {_REMEDY}.")
    number = size if isinstance(size, int) else _parse(size)
    if number < 1:
        raise ConfigError(f"A size of {size!r} is too small: {_REMEDY}.")
    return number


def _parse(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    # "1i", "1ib" and sizes beyond any machine (which Python may refuse to convert) are typing mistakes.
    if match is None or (match[3] and not match[2]) or len(match[1]) > 30:
        raise ConfigError(f"{text!r} is not a size in bytes: {_REMEDY}.")
    decimal = match[2] and match[4] and not match[3]
    base = 1000 if decimal else 1024
    return int(Fraction(match[1]) * base ** _POWERS[match[2].lower()])


def format_bytes(size: float) -> str:
    """Return `size` bytes with three digits and a power-of-1024 unit, for example `1.50 GiB`."""
    value = float(size)
    unit = 0
    # 999.5 would be shown as 1000: the next unit keeps three digits.
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    if unit == 0:
        return f"{value:.0f} B"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {_UNITS[unit]}"
