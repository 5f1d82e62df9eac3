"""Whether the branches of a `oneOf` exclude each other: then it says the same as `anyOf`, which can be enforced."""

import json
from itertools import combinations
from typing import Any

_ALL = frozenset({"null", "boolean", "number", "string", "array", "object"})


def disjoint(branches: list[Any], root: Any) -> bool:
    """True where every two branches differ in type, or in the constants allowed for a property both require.

    branches: subschemas of the valid schema `root`; references are followed.
    """
    resolved = [resolve(branch, root) for branch in branches]
    return all(_apart(one, other, root) for one, other in combinations(resolved, 2))


def _apart(one: Any, other: Any, root: Any) -> bool:
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    if not _types(one) & _types(other):
        return True
    if _constants_differ(one, other):
        return True
    if _types(one) & _types(other) != {"object"}:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    for name in shared & one.get("properties", {}).keys() & other.get("properties", {}).keys():
        mine, theirs = (resolve(branch["properties"][name], root) for branch in (one, other))
        if isinstance(mine, dict) and isinstance(theirs, dict) and _constants_differ(mine, theirs):
            return True
    return False


def _constants_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = _constants(one), _constants(other)
    return mine is not None and theirs is not None and not mine & theirs


def _constants(schema: dict[str, Any]) -> set[str] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if values is None else {json.dumps(value, sort_keys=True) for value in values}


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    if given is None:
        return frozenset({"object"}) if "properties" in schema and "required" in schema else _ALL
    names = [given] if isinstance(given, str) else given
    return frozenset("number" if name == "integer" else name for name in names)


def resolve(schema: Any, root: Any) -> Any:
    """What a reference leads to; the reference itself where it leads nowhere or in a circle."""
    for _ in range(8):
        if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#/"):
            return schema
        target = root
        for part in schema["$ref"][2:].split("/"):
            target = target.get(part) if isinstance(target, dict) else None
        if target is None:
            return schema
        schema = target
    return schema
