"""Compiles what output must look like (any JSON object, a JSON schema, tool calls) into bytes for the engine.

JSON is written without free whitespace: small models otherwise like to go on with blanks for ever.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import xgrammar

from kvfold.engine.json_schema import prepare_schema
from kvfold.engine.schema_branches import resolve
from kvfold.engine.vocabulary import JSON, TEXT, Vocabularies
from kvfold.errors import GrammarError

MAX_COMPILED_BYTES = 1 << 26
_CACHE_BYTES = 1 << 26
_LOG_PREFIX = re.compile(r"^\[[\d:]+\] \S+ (Check failed: )?")
_T = TypeVar("_T")
_JSON: dict[str, Any] = {"any_whitespace": False, "separators": (",", ":")}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolGrammar:
    """A tool whose calls are to be constrained. parameters: JSON schema of an object; None: no arguments."""

    name: str
    parameters: Mapping[str, Any] | bool | None = None
    strict: bool = False


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary; may be used from several threads, compiling frees the GIL.

    tokenizer: transformers' (fast). vocab_size: width of the model's logits, which may be padded beyond the
    tokenizer's. stop_token_ids: the model's ends of sequence. The engine must be given the same three.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Iterable[int]) -> None:
        self._vocabularies = vocabularies = Vocabularies(tokenizer, vocab_size, stop_token_ids)
        # One thread: the other cores compute the model meanwhile.
        self._compiler = lru_cache(2)(
            lambda kind: xgrammar.GrammarCompiler(vocabularies.of(kind), max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        )

    def json_object(self) -> bytes:
        """The grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool, *, strict: bool = True) -> bytes:
        """The grammar of JSON that is valid for `schema` (2020-12; unmentioned properties are not written).

        strict: whether parts that cannot be enforced raise (True) or are left out.
        Raises GrammarError for a schema that is invalid, unsupported, impossible or too large.
        """
        text = json.dumps(prepare_schema(schema, strict=strict))
        return self._finish(JSON, lambda: self._compiler(JSON).compile_json_schema(text, **_JSON))

    def tool_calls(self, tools: Iterable[ToolGrammar], *, required: bool = False, parallel: bool = True) -> bytes:
        """The grammar of text with calls `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`.

        required: calls alone, at least one; otherwise text, in which `<tool_call>` begins a call of one of the
        tools. parallel: any number of calls; otherwise one at most, with which the output ends.
        Raises GrammarError for a parameter schema as `json_schema` does, and for no tools at all.
        """
        tags = [self._tag(tool) for tool in tools]
        if not tags:
            raise GrammarError("there is no tool to call; give at least one")
        if required and parallel:
            kind = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
        else:
            kind = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": tags}
            kind |= {"at_least_one": required, "stop_after_first": not parallel}
        begins = [str(tag["begin"]) for tag in tags]
        structure = {"type": "structural_tag", "format": kind}
        return self._finish(TEXT, lambda: self._compiler(TEXT).compile_structural_tag(structure), begins)

    def _tag(self, tool: ToolGrammar) -> dict[str, Any]:
        parameters = _NO_ARGUMENTS if tool.parameters is None else tool.parameters
        try:
            schema = prepare_schema(parameters, strict=tool.strict)
            schema = {"type": "object"} if schema in (True, {}) else schema
            root = resolve(schema, schema)
            if not isinstance(root, dict) or root.get("type") != "object":
                raise GrammarError('they are no object; give a schema of "type": "object"')
            text = json.dumps(schema)
            grammar = _guarded(lambda: str(xgrammar.Grammar.from_json_schema(text, **_JSON)))
        except GrammarError as error:
            raise GrammarError(f"the parameters of tool {tool.name!r} cannot be used: {error}") from error
        return {
            "type": "tag",
            "begin": _begin(tool.name),
            # As text of a grammar, because a schema in a structural tag always has free whitespace.
            "content": {"type": "grammar", "grammar": grammar},
            "end": "}\n</tool_call>",
        }

    def _finish(
        self, kind: bytes, compile_it: Callable[[], xgrammar.CompiledGrammar], begins: Sequence[str] = ("",)
    ) -> bytes:
        """The bytes of a grammar, once something may follow each of `begins`."""
        compiled = _guarded(compile_it)
        for begin in begins:
            bitmask = xgrammar.allocate_token_bitmask(1, self._vocabularies.size)
            matcher = xgrammar.GrammarMatcher(compiled)
            possible = matcher.accept_string(begin) if begin else True
            if not possible or (matcher.fill_next_token_bitmask(bitmask) and not bitmask.any()):
                after = f" after {begin!r}" if begin else ""
                raise GrammarError(f"no output is possible{after}; give a schema that some value satisfies")
        data = kind + compiled.serialize_json().encode()
        if len(data) > MAX_COMPILED_BYTES:
            raise GrammarError(
                "the JSON schema is too complex; use fewer optional properties and long strings with limits"
            )
        return data


def _begin(name: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '


def _guarded(call: Callable[[], _T]) -> _T:
    """Calls into xgrammar, whose errors are RuntimeErrors with a source line in front."""
    try:
        return call()
    except (RuntimeError, ValueError, TypeError) as error:
        reason = _LOG_PREFIX.sub("", str(error)).strip()
        raise GrammarError(f"the JSON schema cannot be compiled ({reason[:200]}); simplify it") from error
