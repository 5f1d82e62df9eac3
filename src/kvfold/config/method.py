"""From a method string to a `MethodExpression`, with the position of the first mistake."""

import math
import re
from collections.abc import Sequence
from typing import NoReturn

from kvfold.config.expression import CONSTANTS, MAX_DIGITS, NAME, MethodCall, MethodExpression, Value
from kvfold.errors import ConfigError

__all__ = ["MethodCall", "MethodExpression", "Value", "parse_method"]

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![A-Za-z0-9_.])")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)(?![A-Za-z0-9_-])", re.IGNORECASE)
_SHOWN = 200
"""Characters of a method that an error message repeats."""

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\s,()=+]+")


def parse_method(text: str) -> MethodExpression:
    """Parse a method string such as `"zeroc(bits=4)+snapkv(budget=1024)"`.

    Raises:
        ConfigError: the text does not follow the grammar of `kvfold.config.expression`; the message says at
            which character (counted from 1) and what to write instead.
    """
    if not isinstance(text, str):
        raise ConfigError(f"A KV method must be a string, not {type(text).__name__}: write 'zeroc(bits=4)'.")
    if not text.strip():
        raise ConfigError("The KV method is empty: use 'none' for the dense cache or, say, 'zeroc(bits=4)'.")
    return _Parser(text).expression()


def list_methods(kv: str | Sequence[str]) -> list[str]:
    """One method or several, each once. Raises ConfigError where there is none."""
    methods = [kv] if isinstance(kv, str) else list(dict.fromkeys(kv)) if isinstance(kv, list | tuple) else []
    if not methods:
        raise ConfigError(f"kv={kv!r} names no method; give 'none' or, say, 'zeroc(bits=4)'")
    return methods


def choose_method(methods: Sequence[str], kv: str | None) -> int:
    """The index in `methods` of the one that `kv` names, however it is spaced; None is the first.

    Raises ConfigError where it is not among them.
    """
    if kv is None:
        return 0
    wanted = parse_method(kv)
    for index, method in enumerate(methods):
        if parse_method(method) == wanted:
            return index
    raise ConfigError(f"kv={kv!r} is not among the methods loaded; choose one of: {', '.join(methods)}")


class _Parser:
    """Recursive descent over `text`; `position` is the index of the next unread character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def expression(self) -> MethodExpression:
        calls = [self.call()]
        while self.accept("+"):
            calls.append(self.call())
        if self.position < len(self.text):
            found = self.text[self.position]
            if found == ")":
                self.fail("there is a ')' that closes nothing", "remove it")
            self.fail(f"{found!r} cannot follow a method", "join methods with '+'")
        return MethodExpression(tuple(calls))

    def call(self) -> MethodCall:
        name = self.name("a method name", "write a name such as zeroc")
        arguments: dict[str, Value] = {}
        self.skip_space()
        opened = self.position
        if not self.accept("("):
            return MethodCall(name)
        while not self.accept(")"):
            self.argument(arguments, opened)
            if not self.accept(",") and not self.peek(")"):
                self.after_argument(opened)
        return MethodCall(name, arguments)

    def argument(self, arguments: dict[str, Value], opened: int) -> None:
        self.skip_space()
        start = self.position
        if start == len(self.text):
            self.unclosed(opened)
        if self.peek(","):
            self.fail("an argument is missing before ','", "write key=value or remove the comma")
        positional = self.value_without_key()
        if positional is not None:
            self.fail(f"{positional} has no parameter name", "write key=value, for example bits=4", start)
        key = self.name("a parameter name", "write key=value, for example bits=4")
        if not self.accept("="):
            self.fail(f"parameter {key!r} has no value", f"write {key}=value")
        if key in arguments:
            self.fail(f"parameter {key!r} is given twice", "keep one of them", start)
        arguments[key] = self.value(key)

    def value_without_key(self) -> str | None:
        """The text of a value that stands where a parameter name should, or None."""
        self.skip_space()
        if self.text[self.position] in "\"'":
            return "a string"
        number = _NUMBER.match(self.text, self.position)
        if number:
            return number[0]
        name = NAME.match(self.text, self.position)
        if name and _SPACE.sub("", self.text[name.end() : name.end() + 1]) in (",", ")"):
            return repr(name[0])
        return None

    def value(self, key: str) -> Value:
        self.skip_space()
        start = self.position
        if start == len(self.text) or self.text[start] in ",)":
            self.fail(f"parameter {key!r} has no value", f"write {key}=value")
        if self.text[start] in "\"'":
            return self.string()
        if _NOT_FINITE.match(self.text, start):
            self.fail(f"parameter {key!r} is not a finite number", "give a finite number")
        if number := _NUMBER.match(self.text, start):
            return self.number(key, number)
        if (name := NAME.match(self.text, start)) is None:
            word = _WORD.match(self.text, start)
            found = word[0] if word else self.text[start]
            self.fail(f"{found!r} is not a value", "give a number, True, False, None or a string in quotes")
        self.position = name.end()
        if self.peek("("):
            self.fail("a method as a value needs quotes", f'write {key}="{name[0]}(...)"', start)
        return CONSTANTS.get(name[0], name[0])

    def number(self, key: str, match: re.Match[str]) -> int | float:
        text = match[0]
        if len(text) > MAX_DIGITS:
            self.fail(f"parameter {key!r} has more than {MAX_DIGITS} characters", "give a shorter number")
        number = int(text) if _INTEGER.fullmatch(text) else float(text)
        if not math.isfinite(number):
            self.fail(f"parameter {key!r} is too large", "give a finite number")
        self.position = match.end()
        return number

    def string(self) -> str:
        start = self.position
        quote = self.text[start]
        characters: list[str] = []
        self.position += 1
        while self.position < len(self.text):
            character = self.text[self.position]
            self.position += 1
            if character == quote:
                return "".join(characters)
            if character == "\\" and self.text[self.position : self.position + 1] in ("\\", '"', "'"):
                character = self.text[self.position]
                self.position += 1
            characters.append(character)
        self.fail("the string is not closed", f"add {quote} at its end", start)

    def after_argument(self, opened: int) -> NoReturn:
        if self.position == len(self.text):
            self.unclosed(opened)
        found = self.text[self.position]
        self.fail(f"{found!r} cannot follow a value", "write ',' before the next argument or ')'")

    def unclosed(self, opened: int) -> NoReturn:
        self.fail("the parenthesis is not closed", "add ')'", opened)

    def name(self, what: str, remedy: str) -> str:
        self.skip_space()
        if not (match := NAME.match(self.text, self.position)):
            word = _WORD.match(self.text, self.position)
            rest = word[0] if word else self.text[self.position : self.position + 1]
            self.fail(f"{what} is missing" if not rest else f"{rest!r} is not {what}", remedy)
        self.position = match.end()
        return match[0]

    def peek(self, symbol: str) -> bool:
        self.skip_space()
        return self.text.startswith(symbol, self.position)

    def accept(self, symbol: str) -> bool:
        found = self.peek(symbol)
        self.position += len(symbol) if found else 0
        return found

    def skip_space(self) -> None:
        space = _SPACE.match(self.text, self.position)
        self.position = space.end() if space else self.position

    def fail(self, problem: str, remedy: str, position: int | None = None) -> NoReturn:
        at = self.position if position is None else position
        shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        raise ConfigError(f"In the KV method {shown!r}, at character {at + 1}, {problem}: {remedy}.")
