"""Methods by name: from a method string to the dataclasses that implement it."""

from dataclasses import fields
from typing import Any, get_args

from kvfold.config.expression import MethodCall, MethodExpression
from kvfold.config.method import parse_method
from kvfold.config.suggest import suggest
from kvfold.errors import ConfigError
from kvfold.methods.adakv import AdaKV
from kvfold.methods.batchmax import BatchMax
from kvfold.methods.dbudgetkv import DBudgetKV
from kvfold.methods.decoquant import DecoQuant
from kvfold.methods.dense import Dense
from kvfold.methods.ems import EMS
from kvfold.methods.expected import Expected
from kvfold.methods.h2o import H2O
from kvfold.methods.hack import Hack
from kvfold.methods.integer import Int4, Int8
from kvfold.methods.keydiff import KeyDiff
from kvfold.methods.kivi import Kivi
from kvfold.methods.kvcompress import KVCompress
from kvfold.methods.method import Method
from kvfold.methods.policy import Policy, Staged
from kvfold.methods.pyramidkv import PyramidKV
from kvfold.methods.snapkv import SnapKV
from kvfold.methods.streaming import Streaming
from kvfold.methods.think import Think
from kvfold.methods.tova import Tova
from kvfold.methods.zeroc import ZeroC
from kvfold.methods.zipcache import ZipCache

CODECS: dict[str, type[Any]] = {
    codec.name: codec for codec in (Dense, ZeroC, Kivi, ZipCache, Hack, Think, DecoQuant, Int8, Int4)
}
POLICIES: dict[str, type[Any]] = {
    policy.name: policy
    for policy in (
        SnapKV, PyramidKV, AdaKV, KVCompress, H2O, Tova, Expected, KeyDiff, EMS, DBudgetKV, BatchMax, Staged, Streaming,
    )
}  # fmt: skip
METHODS = CODECS | POLICIES


def build_method(method: str | MethodExpression) -> Method:
    """The method that a method string asks for.

    Raises ConfigError for an unknown method or parameter (naming the nearest), for values of a wrong type or out of
    range, and for methods that do not combine, saying why.
    """
    expression = method if isinstance(method, MethodExpression) else parse_method(method)
    parts = [_build(call) for call in expression.calls]
    codecs = [p for p in parts if type(p) in CODECS.values()]
    policies = [p for p in parts if type(p) in POLICIES.values()]
    for kind, several in (("codes what is kept", codecs), ("chooses what is kept", policies)):
        if len(several) > 1:
            names = " + ".join(p.name for p in several)
            raise ConfigError(f"{names} do not combine: each {kind}; use one of them")
    codec = codecs[0] if codecs else Dense()
    chooser = policies[0] if policies else None
    if isinstance(chooser, Streaming):
        return Method(codec, window=chooser)
    if chooser is None and not codec.positional:
        chooser = Staged(every=codec.every)
    return Method(codec, chooser)


def build_policy(name: str, text: str) -> Policy:
    """The policy that a parameter of the method `name` names. Raises ConfigError for anything else."""
    expression = parse_method(text)
    policy = _build(expression.calls[0]) if len(expression.calls) == 1 else None
    if not isinstance(policy, Policy) or not policy.drops or isinstance(policy, BatchMax):
        known = ", ".join(n for n, p in POLICIES.items() if issubclass(p, Policy) and p.drops and p is not BatchMax)
        raise ConfigError(f"{name} policy={text!r} is not a policy that drops tokens; choose one of: {known}")
    return policy


def _build(call: MethodCall) -> Any:
    if call.name not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"unknown KV method {call.name!r}{suggest(call.name, METHODS)}; known methods: {known}")
    arguments = _arguments(call)
    if call.name == BatchMax.name:
        inner = build_policy(BatchMax.name, arguments.get("policy", BatchMax.policy))
        return BatchMax.around(inner, arguments)
    return METHODS[call.name](**arguments)


def _arguments(call: MethodCall) -> dict[str, Any]:
    known = {field.name: field for field in fields(METHODS[call.name]) if field.metadata.get("parameter", True)}
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
