"""What a KV method string means: `zeroc(bits=4)+snapkv(budget=1024)` as data, and back to text.

Grammar (spaces between tokens do not count; `kvfold.config.method` parses it):

    expression = call ("+" call)*
    call       = name [ "(" [ name "=" value ("," name "=" value)* ] ")" ]
    value      = integer | float | True | False | None | string | name
    string     = text in single or double quotes, with backslash before a quote or a backslash

A bare name as a value is a string (`map=stacked`), a string may hold another method
(`batchmax(policy="adakv(alpha=0.2)")`). Which methods and parameters exist is not the grammar's business.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvfold.errors import ConfigError

Value = int | float | bool | str | None
"""What a method parameter may be."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""A method or parameter name."""

CONSTANTS: Mapping[str, bool | None] = MappingProxyType(
    {"True": True, "true": True, "False": False, "false": False, "None": None, "none": None}
)
"""The bare words that are not strings when they stand as a value."""

MAX_DIGITS = 300
"""Longest number accepted; no setting needs it, and Python refuses integers far beyond it."""


@dataclass(frozen=True)
class MethodCall:
    """One method with its arguments, for example `zeroc(bits=4)`.

    Attributes:
        name: the method's name as the user wrote it.
        arguments: parameter name to value; read-only, order as written.

    Raises:
        ConfigError: a name that the grammar cannot express, or a value of another type or not finite.
    """

    name: str
    arguments: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.arguments):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is not a method or parameter name: use letters, digits, _, -.")
        for key, value in self.arguments.items():
            _check_value(key, value)
        object.__setattr__(self, "arguments", MappingProxyType(dict(self.arguments)))

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.arguments.items())))

    def __reduce__(self) -> tuple[type["MethodCall"], tuple[str, dict[str, Value]]]:
        # A mapping proxy cannot be pickled, and a call must travel to other processes.
        return MethodCall, (self.name, dict(self.arguments))

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        items = sorted(self.arguments.items())
        return f"{self.name}({', '.join(f'{key}={format_value(value)}' for key, value in items)})"


@dataclass(frozen=True)
class MethodExpression:
    """One or more methods applied together; `str()` is canonical and parses to an equal expression.

    Raises:
        ConfigError: no call is given.
    """

    calls: tuple[MethodCall, ...]

    def __post_init__(self) -> None:
        if not self.calls:
            raise ConfigError("A KV method needs at least one call: use 'none' for the dense cache.")

    def __str__(self) -> str:
        return "+".join(map(str, self.calls))


def format_value(value: Value) -> str:
    """Return `value` as the grammar writes it; strings are always in double quotes."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _check_value(key: str, value: object) -> None:
    if value is not None and not isinstance(value, int | float | str):
        raise ConfigError(f"{key}={value!r} is not allowed: give a number, a string, True, False or None.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} is not allowed: give a finite number.")
    if isinstance(value, int) and abs(value) >= 10 ** (MAX_DIGITS - 1):
        raise ConfigError(f"{key} has too many digits: give a smaller number.")
