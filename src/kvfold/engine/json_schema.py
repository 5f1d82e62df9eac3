"""JSON schemas made fit for xgrammar, which enforces a part of the language and silently ignores the rest.

A schema is checked against the meta-schema (2020-12) and rewritten so that all it says is enforced; where that is not
possible, a strict schema is refused and a lax one loses that part. Everything happens before C++ sees the schema,
because recursion or repetition without limit would take the process down there.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from kvfold.engine.schema_branches import disjoint
from kvfold.engine.schema_patterns import enforceable, length_pattern, pattern_cost
from kvfold.errors import GrammarError

MAX_BYTES = 1 << 16
MAX_DEPTH = 32
"""Nested objects and lists of the schema's own text."""
MAX_SUBSCHEMAS = 256
MAX_REPEATS = 1024
"""Characters that one pattern counts; xgrammar's time grows with them."""

_IGNORED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "contentSchema"),
}
_OBJECT = ("properties", "required", "additionalProperties", "patternProperties", "propertyNames")
_KEYWORDS = {
    "object": {*_OBJECT, "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_ASSERTIONS = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", *set().union(*_KEYWORDS.values())}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def prepare_schema(schema: object, *, strict: bool = True) -> dict[str, Any] | bool:
    """The schema as xgrammar is to compile it: whatever the result accepts, `schema` accepts.

    strict: whether parts that cannot be enforced are refused (True) or left out.
    Raises GrammarError for what is no JSON schema, too large, impossible or unsupported.
    """
    check_size(schema)
    try:
        error = next(iter(_meta_schema().iter_errors(schema)), None)
    except RecursionError as cause:
        raise GrammarError("the JSON schema is nested too deeply; flatten it") from cause
    if error is not None:
        place = "/".join(map(str, error.absolute_path))
        raise GrammarError(f"the JSON schema is not valid at {place or 'its top'}: {error.message[:200]}")
    return _Rewriter(schema, strict).rewrite(schema, "")


def check_size(value: object) -> None:
    """Raises GrammarError for what is not JSON, or is longer or deeper than anything that is compiled."""
    level, depth, count = [value], 0, 0
    while level:
        count += len(level)
        if depth > MAX_DEPTH or count > MAX_BYTES:  # every value takes a byte or more
            raise GrammarError(
                f"the JSON schema is too large; keep it under {MAX_BYTES // 1024} KiB and {MAX_DEPTH} levels of nesting"
            )
        level, depth = [child for item in level for child in _children(item)], depth + 1
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise GrammarError("the schema is not JSON; give finite numbers and text in UTF-8") from error
    if size > MAX_BYTES:
        raise GrammarError(f"the JSON schema has {size} bytes; keep it under {MAX_BYTES // 1024} KiB")


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise GrammarError("the schema is not JSON; all keys must be strings")
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


@cache
def _meta_schema() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(Draft202012Validator.META_SCHEMA)


class _Rewriter:
    """One pass over a valid schema. Places are JSON pointers, for the messages."""

    def __init__(self, root: Any, strict: bool) -> None:
        self._root = root
        self._strict = strict
        self._count = 0
        self._costs: dict[str, int] = {}  # by pattern or limits: equal ones are compiled once

    def rewrite(self, schema: Any, place: str) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        self._count += 1
        if self._count > MAX_SUBSCHEMAS:
            raise GrammarError(f"the JSON schema has more than {MAX_SUBSCHEMAS} subschemas; simplify it")
        for keyword in sorted(_IGNORED & schema.keys()):
            self._refuse(place, f'"{keyword}"')
        node = {key: value for key, value in schema.items() if key in _ASSERTIONS or key == "format"}
        result = self._one_kind(node, place)
        for key in ("$defs", "definitions"):
            if key in schema:
                result[key] = {n: self.rewrite(s, f"{place}/{key}/{n}") for n, s in schema[key].items()}
        return result

    def _one_kind(self, node: dict[str, Any], place: str) -> dict[str, Any]:
        """xgrammar looks at one of reference, values, branches or type, in this order, and at nothing beside it."""
        if "$ref" in node:
            if not node["$ref"].startswith("#"):
                raise GrammarError(f'"$ref" at {place or "the top"} leaves the schema; refer to its own "$defs"')
            self._alone(node, place, "$ref")
            return {"$ref": node["$ref"]}
        if "enum" in node or "const" in node:
            return self._values(node, place)
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in node:
                self._alone(node, place, keyword)
                return self._branches(keyword, node[keyword], place)
        return self._typed(node, place)

    def _values(self, node: dict[str, Any], place: str) -> dict[str, Any]:
        self._alone(node, place, "const" if "const" in node else "enum", "type")
        values = [node["const"]] if "const" in node else node["enum"]
        names = _types(node)
        allowed = [v for v in values if not names or any(_TYPES[name](v) for name in names)]
        if not allowed:
            raise GrammarError(f"no value is possible at {place or 'the top'}; give enum values of the given type")
        return {"enum": allowed}

    def _branches(self, keyword: str, branches: list[Any], place: str) -> dict[str, Any]:
        if keyword == "allOf" and len(branches) > 1:
            self._refuse(place, '"allOf" of several schemas')
            return {}
        if keyword == "oneOf" and not disjoint(branches, self._root):
            self._refuse(place, '"oneOf" whose branches cannot be told apart by type or by a constant property')
        rewritten = [self.rewrite(branch, f"{place}/{keyword}/{i}") for i, branch in enumerate(branches)]
        possible = [branch for branch in rewritten if branch is not False]
        if not possible:
            raise GrammarError(f"no value is possible at {place or 'the top'}; give a schema that allows some")
        return {"anyOf": possible}

    def _typed(self, node: dict[str, Any], place: str) -> dict[str, Any]:
        if "type" not in node:
            groups = [name for name, keywords in _KEYWORDS.items() if keywords & node.keys()]
            if len(groups) > 1:
                self._refuse(place, 'keywords of several types without a "type"')
            if len(groups) != 1:
                return {}
            node = {"type": groups[0], **node}
        for name, rewrite in (("object", self._object), ("array", self._array), ("string", self._string)):
            if name in _types(node):
                rewrite(node, place)
        if {"integer", "number"} & set(_types(node)):
            self._number(node, place)
        return node

    def _object(self, node: dict[str, Any], place: str) -> None:
        extra, patterns = node.get("additionalProperties"), node.get("patternProperties")
        required, named = node.get("required", []), node.get("properties", {})
        if extra is None and not patterns and "properties" not in node:
            extra = True
        missing = [name for name in required if name not in named]
        if missing and extra is False and not patterns:
            raise GrammarError(f"property {missing[0]!r} at {place or 'the top'} is required but never allowed")
        if (patterns or "propertyNames" in node) and (named or missing):
            self._refuse(place, '"patternProperties" or "propertyNames" beside "properties" or "required"')
        # A name given twice counts once, and only the names that are spelt out cannot be given twice.
        if node.get("minProperties", 0) > max(1, len(required)) and (extra not in (None, False) or patterns):
            self._refuse(place, '"minProperties" with names that are not given')
        named = named | {name: extra if isinstance(extra, dict) else True for name in missing}
        properties = {name: self.rewrite(value, f"{place}/properties/{name}") for name, value in named.items()}
        if never := next((name for name in required if properties[name] is False), None):
            raise GrammarError(f"property {never!r} at {place or 'the top'} is required but never allowed")
        if "properties" in node or properties:
            node["properties"] = {name: value for name, value in properties.items() if value is not False}
        if patterns:
            node["patternProperties"] = {n: self.rewrite(s, f"{place}/patternProperties") for n, s in patterns.items()}
        if extra is not None:
            node["additionalProperties"] = self.rewrite(extra, f"{place}/additionalProperties")
        if "propertyNames" in node:
            node["propertyNames"] = self.rewrite(node["propertyNames"], f"{place}/propertyNames")

    def _array(self, node: dict[str, Any], place: str) -> None:
        if node.pop("uniqueItems", False):
            self._refuse(place, '"uniqueItems"')
        prefix = node.get("prefixItems", [])
        if prefix:
            node["prefixItems"] = [self.rewrite(s, f"{place}/prefixItems/{i}") for i, s in enumerate(prefix)]
        if "items" in node or node.get("minItems", 0) > len(prefix):
            node["items"] = self.rewrite(node.get("items", True), f"{place}/items")

    def _string(self, node: dict[str, Any], place: str) -> None:
        pattern, lengths = node.get("pattern"), {"minLength", "maxLength"} & node.keys()
        if pattern is not None and lengths:
            self._refuse(place, '"pattern" together with "minLength" or "maxLength"')
        if pattern is not None or lengths:
            node.pop("format", None)  # an annotation, which would displace them
        if pattern is None:
            least, most = node.get("minLength", 0), node.get("maxLength")
            written = length_pattern(least, most) if lengths else None
            if written is not None:
                node["pattern"] = written
                for key in lengths:
                    del node[key]
            if lengths:
                # xgrammar's own rule costs the same from about 512 on.
                self._spend(f"{least} {most}", min(512, int(most if most is not None else least)))
            return
        for key in lengths:
            del node[key]
        cost = pattern_cost(pattern)
        if not enforceable(pattern) or cost > MAX_REPEATS:
            self._refuse(
                place, f"a pattern with lookaround, flags or inner anchors, or more than {MAX_REPEATS} repeats"
            )
            del node["pattern"]
            return
        self._spend(pattern, cost)

    def _spend(self, what: str, cost: int) -> None:
        self._costs[what] = cost
        if sum(self._costs.values()) > 4 * MAX_REPEATS:
            raise GrammarError(f"lengths and patterns add up to more than {4 * MAX_REPEATS} repeats; lower some")

    def _number(self, node: dict[str, Any], place: str) -> None:
        step = node.get("multipleOf")
        if step is not None and (
            "number" in _types(node)
            or step != int(step)
            or step > 1024
            or (_KEYWORDS["number"] & node.keys()) - {"multipleOf"}
        ):
            self._refuse(place, '"multipleOf" other than of an integer type, up to 1024 and without limits')
            del node["multipleOf"]
        if "number" not in _types(node):
            for key, whole in (("minimum", math.ceil), ("maximum", math.floor)):
                if key in node:
                    node[key] = whole(node[key])
            for key, whole in (("exclusiveMinimum", math.floor), ("exclusiveMaximum", math.ceil)):
                if key in node:
                    node[key] = whole(node[key])

    def _alone(self, node: Mapping[str, Any], place: str, keyword: str, *beside: str) -> None:
        others = sorted((node.keys() & _ASSERTIONS) - {keyword, *beside})
        if others:
            self._refuse(place, f'"{others[0]}" beside "{keyword}"')

    def _refuse(self, place: str, what: str) -> None:
        if self._strict:
            raise GrammarError(f"{what} at {place or 'the top'} of the JSON schema cannot be enforced; leave it out")


def _types(node: Mapping[str, Any]) -> list[str]:
    """The names in `type`; none where it is not given."""
    given = node.get("type", [])
    return [given] if isinstance(given, str) else list(given)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
