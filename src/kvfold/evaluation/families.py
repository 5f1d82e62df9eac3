"""Families of methods: a method string with one number left free, which a budget of bytes then decides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfold.config.expression import MethodCall, MethodExpression, Value
from kvfold.config.method import parse_method
from kvfold.errors import ConfigError
from kvfold.evaluation.catalogue import COMPRESS, CONTEXT, check_method, chooses, has_parameter, knob_of, staged
from kvfold.methods.dense import Dense

_OPENING, _CLOSING, _QUOTES = "([", ")]", "\"'"


@dataclass(frozen=True)
class Knob:
    """A grid of values, ascending in what they cost: low, low + step, ..., high; integers if all of them are."""

    low: float
    high: float
    step: float

    @property
    def last(self) -> int:
        """The index of `high`."""
        return round((self.high - self.low) / self.step)

    def value(self, index: int) -> float:
        return self.low + index * self.step


BITS = Knob(1.0, 16.0, 1 / 16)
SHARE = Knob(1 / 1024, 1.0, 1 / 1024)
PART = Knob(1 / 1024, 1023 / 1024, 1 / 1024)
TOKENS = Knob(8, 2**20, 8)
KNOBS = {"bits": BITS, "budget": SHARE, "salient": PART, "keep": PART, "window": TOKENS}
"""By parameter. A method whose knob is another one (a threshold that says what is lost) stays at its own size."""


ALL = "all"
EVERY_FAMILY = (
    "zeroc",
    "kivi(bits=2)|kivi(bits=4,value_bits=2)|kivi(bits=4)",
    "hack(bits=2)|hack(bits=4)|hack(bits=8)",
    "zipcache|zipcache(hi=8,lo=4)",
    "|".join(f"decoquant(bits={bits})" for bits in range(1, 9)),
    "int4|int8",
    "think",
    "streaming",
    *("snapkv", "pyramidkv", "adakv", "kvcompress", "h2o", "tova", "expected", "keydiff", "ems", "batchmax"),
    *("dbudgetkv", "snapkv+kivi(bits=4)", "snapkv+zeroc(bits=4)"),
    *("kvcompress+int4", "kvcompress+zeroc(bits=4)", "kvcompress+zeroc(bits=6)"),
)
"""What `all` stands for: every method, codecs of fixed widths with all of them, and policies with a codec."""


@dataclass(frozen=True)
class Form:
    """A method string that is complete (`knob` is None) or lacks the argument `parameter` of its call `index`."""

    expression: MethodExpression
    index: int = 0
    parameter: str = ""
    knob: Knob | None = None

    def method(self, value: float | None = None) -> str:
        """The complete method string, canonical; `value` is the knob's, where there is one."""
        if self.knob is None or value is None:
            return str(self.expression)
        return str(_filled(self.expression, self.index, self.parameter, value))


@dataclass(frozen=True)
class Family:
    """One contender in a comparison: its name and its forms, of which each budget takes the largest that fits."""

    name: str
    forms: tuple[Form, ...]


def parse_families(texts: Sequence[str]) -> list[Family]:
    """Families from method strings, several in a text separated by commas, forms of one family by `|`:
    `zeroc`, `snapkv+zeroc(bits=4)`, `kivi(bits=2)|kivi(bits=4)`, or `all`. The dense cache is no family.

    All become staged: the context is read densely and compressed where it ends. Raises ConfigError for methods that
    do not exist, more than one free number and `compress=`, which is the suite's to say.
    """
    families: dict[str, Family] = {}
    for text in texts:
        named = [part.strip() for part in _split(text, ",")]
        for family in (f for part in named for f in (EVERY_FAMILY if part == ALL else (part,))):
            expressions = [parse_method(form) for form in _split(family, "|")]
            name = "|".join(map(str, expressions))
            if name != Dense.name:
                families[name] = Family(name, tuple(map(_form, expressions)))
    if not families:
        raise ConfigError("no method is named besides the dense cache; give, say, --methods 'zeroc,kivi(bits=4)'")
    return list(families.values())


def _form(expression: MethodExpression) -> Form:
    whole = _staged(expression)
    free = [
        (index, parameter)
        for index, call in enumerate(whole.calls)
        if (parameter := knob_of(call)) in KNOBS and _is_free(whole, index, parameter)
    ]
    if len(free) > 1:
        names = " and ".join(f"{parameter} of {whole.calls[index].name}" for index, parameter in free)
        raise ConfigError(f"{expression} leaves {names} free; give all but one a value")
    if not free:
        check_method(whole)
        return Form(whole)
    ((index, parameter),) = free
    return Form(whole, index, parameter, KNOBS[parameter])


def _is_free(expression: MethodExpression, index: int, parameter: str) -> bool:
    """Another argument may stand in the knob's place: `zeroc(rank=48)` takes no bits."""
    if parameter in expression.calls[index].arguments:
        return False
    try:
        check_method(_filled(expression, index, parameter, KNOBS[parameter].high))
    except ConfigError:
        return False
    return True


def _staged(expression: MethodExpression) -> MethodExpression:
    for call in expression.calls:
        if COMPRESS in call.arguments:
            raise ConfigError(f"{expression} says when to compress; leave that to the suite and its --query-aware")
    for index, call in enumerate(expression.calls):
        if chooses(call):  # by position alone, where it cannot be told when to
            return _filled(expression, index, COMPRESS, CONTEXT) if has_parameter(call, COMPRESS) else expression
    return MethodExpression((staged(expression), *expression.calls))


def _filled(expression: MethodExpression, index: int, parameter: str, value: Value) -> MethodExpression:
    calls = list(expression.calls)
    calls[index] = MethodCall(calls[index].name, {**calls[index].arguments, parameter: value})
    return MethodExpression(tuple(calls))


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts of `text` between separators that stand outside parentheses and quotes."""
    depth, quote, begin = 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character == separator and not depth:
            yield text[begin:i]
            begin = i + 1
        depth += 0 if quote else (character in _OPENING) - (character in _CLOSING)
    yield text[begin:]
