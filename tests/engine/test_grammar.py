"""Constrained output judged by `jsonschema`, which knows nothing of grammars; what a grammar must not disturb."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold import LLM, SamplingParams
from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.grammar import GrammarCompiler, ToolGrammar
from kvfold.engine.lane import build_lane
from kvfold.engine.outputs import CompletionOutput, RequestOutput
from kvfold.engine.schema_patterns import length_pattern
from kvfold.errors import GrammarError, ModelError
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model

INTEGER = {"type": "integer"}
SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "array"},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 12},
    {"type": "boolean"},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"minLength": 2, "maxLength": 6},
    {"type": "string", "minLength": 1, "maxLength": 80},
    {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$"},
    {"type": "string", "pattern": "^(a|b)x|y$"},
    {"type": "string", "format": "date", "minLength": 10},
    {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 2.5},
    {"type": "integer", "exclusiveMinimum": -1000.5, "maximum": -7},
    {"type": "number", "minimum": -1.25, "maximum": 7.5},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "integer", "multipleOf": 7},
    {"enum": ["a", 1, None, {"b": [1, 2]}, 'é "\\\n']},
    {"type": "string", "enum": ["a", 1, None]},
    {"const": {"x": [True, 1.5, "<|end|>"]}},
    {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3},
    {"type": "array", "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False, "minItems": 1},
    {"type": "object", "properties": {"a": INTEGER, "b": {"type": "boolean"}}, "required": ["b"]},
    {"properties": {"a": INTEGER, "b": INTEGER}, "minProperties": 1, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["b"]},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["b"], "additionalProperties": {"type": "boolean"}},
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^k[0-9]$": INTEGER}, "additionalProperties": False, "maxProperties": 3},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": INTEGER},
    {"anyOf": [INTEGER, {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}], "title": "either"},
    {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/p"}], "$defs": {"p": {"type": "boolean"}}},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": name}, "v": INTEGER}, "required": ["kind", "v"]}
            for name in ("one", "two")
        ]
    },
    {"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": {"type": "integer", "minimum": 90}}},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
]
PROMPTS = [[5, 9, 40, 7], [100, 101, 102], [33] * 30]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def compiler(model: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(model.tokenizer, model.spec.vocab, model.spec.eos_token_ids)


def make_engine(model: LoadedModel, kv_memory: int = 2**23, **options: Any) -> Engine:
    lane = build_lane(model.decoder, "none", build_method("none"), 32)
    return Engine(model.decoder, model.tokenizer, [lane], EngineConfig(kv_memory, **options))


def sampled(seed: int = 0, max_tokens: int = 200, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": max_tokens, **options})


def finish(engine: Engine, ids: Sequence[str]) -> list[RequestOutput]:
    done: dict[str, RequestOutput] = {}
    for _ in range(3000):
        if not engine.has_unfinished:
            return [done[i] for i in ids]
        done |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    raise AssertionError("not finished")


def complete(engine: Engine, grammars: Sequence[bytes | None], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """One request per grammar, as one batch."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(grammars))]
    requests = zip(prompts, grammars, params, strict=True)
    return finish(engine, [engine.add_request(prompt, own, grammar=grammar) for prompt, grammar, own in requests])


def one(engine: Engine, grammar: bytes | None, params: SamplingParams) -> CompletionOutput:
    return complete(engine, [grammar], [params])[0].outputs[0]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def judge(output: CompletionOutput, schema: Any) -> None:
    """Valid where it ended by itself; cut off, it must at least not have ended."""
    assert output.finish_reason in ("stop", "length"), output
    if output.finish_reason == "stop":
        value = json.loads(output.text, parse_constant=refuse)
        if "\N{REPLACEMENT CHARACTER}" in output.text:
            return  # bytes that are no UTF-8, which only a random model writes, count as one character
        jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_output_is_valid(model: LoadedModel, compiler: GrammarCompiler, schema: Any) -> None:
    grammar = compiler.json_schema(schema)
    engine = make_engine(model)
    outputs = complete(engine, [grammar] * 6, [sampled(seed, 120, temperature=1.0 + seed % 3) for seed in range(6)])
    for output in outputs:
        judge(output.outputs[0], schema)
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs)


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    small = st.integers(-50, 50)
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, small, st.integers(0, 99)
        ),
        st.builds(
            lambda low, size: {"type": "number", "minimum": low / 8, "maximum": (low + size) / 8},
            small,
            st.integers(1, 99),
        ),
        st.builds(
            lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
            *[st.integers(0, 4)] * 2,
        ),
        st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=4) | small, min_size=1, max_size=3)),
    )


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def as_object(properties: dict[str, Any], required: list[str], more: bool) -> dict[str, Any]:
        known = {name: properties[name] for name in properties}
        return {"type": "object", "properties": known, "required": required, "additionalProperties": more}

    names = st.text(st.sampled_from('ab"\\é {'), min_size=1, max_size=3)
    return st.one_of(
        st.dictionaries(names, inner, max_size=3).flatmap(
            lambda p: st.builds(
                as_object,
                st.just(p),
                st.lists(st.sampled_from(sorted(p) or ["a"]), unique=True, max_size=2 if p else 0),
                st.just(False),
            )
        ),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=3)),
    )


@settings(max_examples=25)
@given(schema=st.recursive(leaves(), nested, max_leaves=4), seed=st.integers(0, 99))
def test_output_under_any_schema_is_valid(
    model: LoadedModel, compiler: GrammarCompiler, schema: Any, seed: int
) -> None:
    engine = make_engine(model)
    grammar = compiler.json_schema(schema)
    for output in complete(engine, [grammar] * 2, [sampled(seed, 150), sampled(seed, 150, temperature=3.0)]):
        judge(output.outputs[0], schema)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "array", "items": INTEGER, "maxItems": 6}},
    "required": ["a", "b"],
}


def test_a_constrained_row_neither_disturbs_nor_depends_on_its_batch(
    model: LoadedModel, compiler: GrammarCompiler
) -> None:
    grammars = [None, compiler.json_schema(SCHEMA), None, compiler.json_object()]
    params = [sampled(seed, 60, logprobs=1) for seed in range(4)]
    together = complete(make_engine(model), grammars, params)
    for index, output in enumerate(together):
        engine = make_engine(model)
        request = engine.add_request(PROMPTS[index % 3], params[index], grammar=grammars[index])
        alone = finish(engine, [request])[0].outputs[0]
        assert output.outputs[0].token_ids == alone.token_ids
        assert output.outputs[0].finish_reason == alone.finish_reason


def test_completions_of_one_request_have_a_state_each(model: LoadedModel, compiler: GrammarCompiler) -> None:
    output = complete(make_engine(model), [compiler.json_schema(SCHEMA)], [sampled(3, n=4)])[0]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    for completion in output.outputs:
        assert completion.finish_reason == "stop"
        judge(completion, SCHEMA)


def test_preemption_keeps_the_state(model: LoadedModel, compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 40, "maxItems": 40}
    grammar, params = compiler.json_schema(schema), sampled(1, 400, n=3)
    roomy = make_engine(model)
    pages = roomy.lanes[0].layout.pages(160) * 3 // 2
    tight = make_engine(model, pages * roomy.memory.pool.page_bytes, prefix_caching=False)
    found = complete(tight, [grammar], [params])[0]
    assert found.metrics.preemptions > 0
    expected = complete(roomy, [grammar], [params])[0]
    for mine, theirs in zip(found.outputs, expected.outputs, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.finish_reason == "stop"
        judge(mine, schema)


@pytest.mark.parametrize("options", [{"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 50, "ignore_eos": True}])
def test_a_complete_grammar_ends_the_output(
    model: LoadedModel, compiler: GrammarCompiler, options: dict[str, Any]
) -> None:
    output = one(make_engine(model), compiler.json_schema({"const": [1, 2]}), sampled(max_tokens=60, **options))
    assert (output.text, output.finish_reason, output.stop_reason) == ("[1,2]", "stop", None)


def test_an_output_that_may_go_on_goes_on_until_min_tokens(model: LoadedModel, compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema({"type": "integer"})
    eos = next(iter(model.spec.eos_token_ids))
    short = one(make_engine(model), grammar, sampled(logit_bias={eos: 100}))
    assert 0 < len(short.text) < 5
    long = one(make_engine(model), grammar, sampled(logit_bias={eos: 100}, min_tokens=20))
    assert len(long.token_ids) >= 20
    assert long.finish_reason == short.finish_reason == "stop"
    int(long.text)


def test_stop_ids_that_the_grammar_needs_are_no_dead_end(model: LoadedModel, compiler: GrammarCompiler) -> None:
    bracket = model.tokenizer.convert_tokens_to_ids("[")
    output = one(
        make_engine(model), compiler.json_schema({"const": [[]]}), sampled(stop_token_ids=[bracket], min_tokens=9)
    )
    assert output.finish_reason == "stop"


def test_a_model_without_end_of_sequence_can_follow_a_grammar(model: LoadedModel) -> None:
    from dataclasses import replace

    spec = replace(model.spec, eos_token_ids=())
    grammar = GrammarCompiler(model.tokenizer, spec.vocab, ()).json_schema(SCHEMA)
    engine = make_engine(model)
    engine._spec = spec
    output = one(engine, grammar, sampled())
    assert output.finish_reason == "stop"
    judge(output, SCHEMA)


def test_log_probabilities_are_those_of_the_model(model: LoadedModel, compiler: GrammarCompiler) -> None:
    """A greedy free run and a run forced to the same tokens have the same ones."""
    grammar = compiler.json_schema(SCHEMA)
    held = one(make_engine(model), grammar, sampled(logprobs=0, max_tokens=20))
    engine = make_engine(model)
    prompt = PROMPTS[0] + held.token_ids
    free = finish(engine, [engine.add_request(prompt, sampled(max_tokens=1, prompt_logprobs=0))])[0]
    expected = [entry[t].logprob for t, entry in zip(prompt, free.prompt_logprobs or [], strict=True) if entry]
    found = [entry[t].logprob for t, entry in zip(held.token_ids, held.logprobs or [], strict=True)]
    assert found == pytest.approx(expected[-len(found) :], abs=1e-3)


def test_a_row_without_a_choice_ends_alone(
    model: LoadedModel, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    ids = [engine.add_request(PROMPTS[i], sampled(i, 20, n=2)) for i in range(3)]
    expected = finish(engine, ids)
    run, steps = engine._runner.run, iter(range(100))

    def poisoned(*arguments: Any) -> Any:
        result = run(*arguments)
        if next(steps) == 5:
            for row, sequence in enumerate(result.ready):
                if sequence.request.id == "bad" and sequence.output.index == 1:
                    with torch.inference_mode():
                        result.logits[row] = torch.nan
        return result

    monkeypatch.setattr(engine._runner, "run", poisoned)
    again = [
        engine.add_request(PROMPTS[i], sampled(i, 20, n=2), request_id="bad" if i == 1 else None) for i in range(3)
    ]
    found = finish(engine, again)
    assert [c.finish_reason for c in found[1].outputs] == ["error", "error"]
    assert "not finite" in str(found[1].outputs[0].stop_reason)
    assert found[1].finished
    for index in (0, 2):
        assert [c.token_ids for c in found[index].outputs] == [c.token_ids for c in expected[index].outputs]
    engine.check_integrity()


def test_offline_generation_raises_what_ended_a_row(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_llama, dtype="float32", kv_memory="1MiB")
    before = llm.generate("A page", sampled())[0].outputs[0].text
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.decoder, "logits", lambda hidden: torch.full((len(hidden), 384), torch.nan))
        with pytest.raises(ModelError, match="not finite"):
            llm.generate(["A page", "A head"], sampled())
    assert not llm.engine.has_unfinished
    assert llm.generate("A page", sampled())[0].outputs[0].text == before


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = INTEGER
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        (False, "cannot accept"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
        ({"enum": []}, "enum|no value"),
        ({"type": "string", "enum": [1]}, "no value"),
        ({"anyOf": []}, "anyOf"),
        ({"anyOf": [False]}, "no value"),
        ({"$ref": "#"}, "no output"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "http://example.com/x"}, "leaves the schema"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"properties": {}, "required": ["a"], "additionalProperties": False}, "'a'"),
        ({"type": 5}, "type"),
        ({"type": "nope"}, "type"),
        ({"properties": 5}, "properties"),
        ({"type": "string", "pattern": "("}, "parenthesis"),
        ({"type": "string", "pattern": "(?=a)b"}, "lookaround"),
        ({"type": "string", "pattern": "a^b"}, "anchors"),
        ({"type": "string", "pattern": "((a{100}){100}){100}"}, "repeats"),
        ({"prefixItems": [{"type": "string", "pattern": f"a{{{n}}}"} for n in range(1000, 1005)]}, "repeats"),
        ({"prefixItems": [{"type": "string", "maxLength": n} for n in range(500, 510)]}, "repeats"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "minLength"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": {"type": "string"}}}, "minLength"),
        ({"anyOf": [{"type": "string"}], "minLength": 2}, "minLength"),
        ({"minLength": 2, "minimum": 2}, "several types"),
        ({"type": "integer", "minimum": 10**30}, "limit"),
        ({"type": "integer", "minimum": float("nan")}, "finite"),
        ({"const": "\ud800"}, "UTF-8"),
        ({1: 2}, "keys"),
        ({"const": object()}, "not JSON"),
        (5, "valid|object"),
        (deep(40), "levels"),
        (deep(100_000), "levels"),
        ({"enum": ["x" * 70_000]}, "KiB"),
        ({"enum": list(range(100_000))}, "KiB"),
        ({"properties": {f"p{i}": {} for i in range(300)}}, "subschemas"),
    ],
    ids=lambda value: repr(value)[:50] if not isinstance(value, dict) else None,
)
def test_schemas_that_cannot_be_served_are_refused(compiler: GrammarCompiler, schema: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        compiler.json_schema(schema)


@pytest.mark.parametrize("least", [0, 1, 31, 32, 70])
@pytest.mark.parametrize("span", [0, 1, 63, 64, 65, 96, 200, None])
def test_length_patterns_mean_the_lengths(least: int, span: int | None) -> None:
    pattern = length_pattern(least, None if span is None else least + span)
    if pattern is None:
        assert span is None
        return
    for length in range(400):
        expected = least <= length and (span is None or length <= least + span)
        assert (re.fullmatch(pattern, "x" * length) is not None) == expected


def test_what_cannot_be_enforced_is_left_out_of_a_lax_schema(model: LoadedModel, compiler: GrammarCompiler) -> None:
    kept = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 5}, "minItems": 2, "maxItems": 3}
    grammar = compiler.json_schema(kept | {"uniqueItems": True, "not": {"maxItems": 0}, "contains": {}}, strict=False)
    judge(one(make_engine(model), grammar, sampled()), kept)
    for schema in ({"allOf": [{"type": "string"}, {"minLength": 2}]}, {"minLength": 2, "minimum": 2}):
        compiler.json_schema(schema, strict=False)


def test_what_is_no_grammar_of_this_model_is_refused(model: LoadedModel, compiler: GrammarCompiler) -> None:
    other = GrammarCompiler(model.tokenizer, model.spec.vocab + 64, model.spec.eos_token_ids).json_object()
    engine = make_engine(model)
    for grammar in (b"", b"{}", b"\xff", other):
        with pytest.raises(GrammarError, match="compile it again"):
            engine.add_request(PROMPTS[0], sampled(), grammar=grammar)
    assert not engine.has_unfinished


def test_a_vocabulary_narrower_or_wider_than_the_tokenizer(model: LoadedModel) -> None:
    for vocab in (model.spec.vocab - 20, model.spec.vocab + 77):
        grammar = GrammarCompiler(model.tokenizer, vocab, [1, 10**6]).json_object()
        assert grammar


@pytest.mark.parametrize("parallel", [False, True])
def test_required_calls_are_made(model: LoadedModel, compiler: GrammarCompiler, parallel: bool) -> None:
    tools = [ToolGrammar("f", SCHEMA), ToolGrammar("g-1")]
    grammar = compiler.tool_calls(tools, required=True, parallel=parallel)
    outputs = complete(make_engine(model), [grammar] * 6, [sampled(seed, 150) for seed in range(6)])
    ended = [output.outputs[0].text for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert ended
    for text in ended:
        calls = [part.removesuffix("</tool_call>") for part in text.strip().split("<tool_call>")[1:]]
        assert len(calls) == 1 if not parallel else len(calls) >= 1
        for call in calls:
            value = json.loads(call.strip().removesuffix("</tool_call>"))
            assert list(value) == ["name", "arguments"]
            schema = SCHEMA if value["name"] == "f" else {"const": {}}
            jsonschema.validate(value["arguments"], schema)


@pytest.mark.parametrize(
    "parameters",
    [{"type": "array"}, {"type": "string"}, {"type": 5}, {"$ref": "#"}, {"properties": {"a": {"type": "x"}}}],
)
def test_parameters_that_are_no_object_schema_are_refused(compiler: GrammarCompiler, parameters: Any) -> None:
    with pytest.raises(GrammarError, match="'f'"):
        compiler.tool_calls([ToolGrammar("f", parameters)])
    with pytest.raises(GrammarError, match="no tool"):
        compiler.tool_calls([])
