"""The nearest known name, as the tail of an error message."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'zeroc'?"` for the option nearest to `name`, or `""` if none is near.

    Case does not count, so that `ZEROC` finds `zeroc`.
    """
    by_folded = {option.casefold(): option for option in sorted(options, reverse=True)}
    nearest = get_close_matches(name.casefold(), by_folded, n=1)
    return f"; did you mean {by_folded[nearest[0]]!r}?" if nearest else ""
