"""What families need to know of the methods that exist."""

from dataclasses import fields

from kvfold.config.expression import MethodCall, MethodExpression, Value
from kvfold.methods.policy import Staged
from kvfold.methods.registry import METHODS, POLICIES, build_method

COMPRESS, CONTEXT = "compress", "context"


def staged(expression: MethodExpression) -> MethodCall:
    """What makes a codec alone read the context densely and code it where it ends, as often after that as it asks."""
    policy = build_method(expression).policy
    arguments: dict[str, Value] = {COMPRESS: CONTEXT}
    if policy is not None and policy.every != Staged.every:
        arguments["every"] = policy.every
    return MethodCall(Staged.name, arguments)


DENSE = str(MethodCall(Staged.name, {COMPRESS: CONTEXT}))
"""The dense cache, as a staged method: others go on from the context that it has read."""


def knob_of(call: MethodCall) -> str | None:
    """The parameter that says how much a method keeps, or None where it has none or does not exist."""
    knob: str | None = getattr(METHODS.get(call.name), "knob", None)
    return knob


def chooses(call: MethodCall) -> bool:
    """Whether a method says which tokens are kept, rather than how they are coded."""
    return call.name in POLICIES


def has_parameter(call: MethodCall, parameter: str) -> bool:
    """Whether a method, if it exists, has a parameter of this name."""
    return call.name in METHODS and any(field.name == parameter for field in fields(METHODS[call.name]))


def check_method(expression: MethodExpression) -> None:
    """Raises ConfigError for a method that does not exist or cannot be built."""
    build_method(expression)
