"""Methods by name: from a method string to the dataclass that implements it."""

from dataclasses import fields
from typing import Any, get_args

from kvfold.config.expression import MethodCall, MethodExpression
from kvfold.config.method import parse_method
from kvfold.config.suggest import suggest
from kvfold.errors import ConfigError
from kvfold.methods.base import Codec
from kvfold.methods.dense import Dense
from kvfold.methods.zeroc import ZeroC

CODECS: dict[str, type[Any]] = {method.name: method for method in (Dense, ZeroC)}


def build_codec(method: str | MethodExpression) -> Codec:
    """The codec that a method string asks for.

    Raises ConfigError for an unknown method or parameter (naming the nearest) and for values of a wrong type or
    out of range.
    """
    expression = method if isinstance(method, MethodExpression) else parse_method(method)
    if len(expression.calls) > 1:
        names = " + ".join(call.name for call in expression.calls)
        raise ConfigError(f"{names} do not combine: each is a codec of its own; name one method")
    call = expression.calls[0]
    if call.name not in CODECS:
        known = ", ".join(CODECS)
        raise ConfigError(f"unknown KV method {call.name!r}{suggest(call.name, CODECS)}; known methods: {known}")
    codec: Codec = CODECS[call.name](**_arguments(call))
    return codec


def _arguments(call: MethodCall) -> dict[str, Any]:
    known = {field.name: field for field in fields(CODECS[call.name])}
    for name, value in call.arguments.items():
        if name not in known:
            listed = f"its parameters: {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{call.name} has no parameter {name!r}{suggest(name, known)}; {listed}")
        allowed = get_args(known[name].type) or (known[name].type,)
        truth = isinstance(value, bool) and bool not in allowed  # which Python would take for an integer
        if isinstance(value, int) and not truth and float in allowed:
            continue
        if truth or not isinstance(value, allowed):
            kinds = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{call.name} {name}={value!r} has the wrong type; give {kinds}")
    return dict(call.arguments)
