"""Regular expressions of JSON schemas: which ones xgrammar understands, and how much work they make."""

import re

# Lookarounds and flags; anchors that do not stand at an end of the pattern or of an alternative.
_UNSUPPORTED = re.compile(r"\(\?(?!:|P<\w|<\w)|(?<![(|:])(?<!^)\^|\$(?![)|])(?!$)")
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ITEM = re.compile(r"[()]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
_MOST = 1 << 31
_BLOCK, _PLAIN, _LONGEST = 32, 64, 512


def enforceable(pattern: str) -> bool:
    """False where xgrammar would ignore a part of the pattern."""
    return _UNSUPPORTED.search(_ESCAPE_OR_CLASS.sub("x", pattern)) is None


def pattern_cost(pattern: str) -> int:
    """The length of the pattern with its counted repeats written out, each at its larger bound."""
    groups = [[0]]
    for item in _ITEM.finditer(_ESCAPE_OR_CLASS.sub("x", pattern)):
        if item[0] == "(":
            groups.append([0])
        elif item[0] == ")" and len(groups) > 1:
            inner = sum(groups.pop())
            groups[-1].append(inner)
        elif item[1] is not None:
            # Cut off, so that a tower of repeats makes no huge number.
            groups[-1][-1] = min(_MOST, groups[-1][-1] * max(1, int(item[1][:9]), int((item[2] or "0")[:9])))
        else:
            groups[-1].append(1)
    return sum(map(sum, groups))


def length_pattern(least: float, most: float | None) -> str | None:
    """A pattern of strings of `least` to `most` characters; None where xgrammar's own rule for lengths is better.

    It compiles to a fraction of what that rule does. Repeats go in blocks: a plain repeat of more than 64 is slow in
    every step.
    """
    low = int(least)
    if most is None:
        return f"^.{{{low},}}$" if low <= _PLAIN else None
    span = int(most) - low
    if span < 0 or most > _LONGEST:
        return None
    fixed = (f"(.{{{_BLOCK}}}){{{low // _BLOCK}}}" if low >= _BLOCK else "") + f".{{{low % _BLOCK}}}" * (
        low % _BLOCK > 0
    )
    if span <= _PLAIN:
        return f"^{fixed}.{{0,{span}}}$"
    rest = _BLOCK + span % _BLOCK
    return f"^{fixed}(.{{{_BLOCK}}}){{0,{(span - rest) // _BLOCK}}}.{{0,{rest}}}$"
