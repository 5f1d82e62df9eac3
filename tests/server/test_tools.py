"""Tools: what is refused, what the prompt says, and that the parser gives the same however the text arrives."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.grammar import GrammarCompiler
from kvfold.engine.lane import build_lane
from kvfold.engine.params import SamplingParams
from kvfold.errors import GrammarError, PromptError
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model
from kvfold.server.tool_parser import ToolParser
from kvfold.server.tools import ToolSet, parse_tools, render_tools

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


WEATHER, CLOCK = tool("get_weather", PARAMETERS, description="The weather."), tool("clock")


def parse(tools: Any, *options: Any) -> ToolSet:
    found = parse_tools(tools, *options)
    assert found is not None
    return found


def call_text(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Template:
    """The part of a tokenizer that rendering looks at."""

    def __init__(self, chat_template: Any) -> None:
        self.chat_template = chat_template


# Choices


def test_choices_say_what_may_be_called() -> None:
    tools = [WEATHER, CLOCK]
    assert parse_tools(None) is parse_tools([]) is parse_tools(tools, "none") is parse_tools([], "none") is None
    auto, required = parse(tools), parse(tools, "required", False)
    named = parse(tools, {"type": "function", "function": {"name": "clock"}})
    assert [t.name for t in auto.callable] == [t.name for t in required.callable] == ["get_weather", "clock"]
    assert [t.name for t in named.callable] == ["clock"]
    assert [(t.required, t.parallel) for t in (auto, required, named)] == [(False, True), (True, False), (True, False)]
    assert list(named.tools) == tools
    assert parse([tool("f", strict=True)]).callable[0].strict
    assert not parse([tool("f", strict=None)]).callable[0].strict


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5,), "list"),
        (([5],), "not understood"),
        (([{"type": "retrieval"}],), "not understood"),
        (([{"type": "function"}],), "not understood"),
        (([tool("")],), "not allowed"),
        (([tool("a b")],), "not allowed"),
        (([tool("é")],), "not allowed"),
        (([tool("a\n")],), "not allowed"),
        (([tool("x" * 65)],), "not allowed"),
        (([{"type": "function", "function": {"name": 5}}],), "not allowed"),
        (([CLOCK, CLOCK],), "two tools"),
        (([tool("f", [])],), "no JSON schema"),
        (([tool("f", {"const": "x" * 70_000})],), "KiB"),
        (([tool(f"f{i}") for i in range(129)],), "at most 128"),
        (([CLOCK], "always"), "not understood"),
        (([CLOCK], 5), "not understood"),
        (([CLOCK], {"type": "function"}), "not understood"),
        (([CLOCK], {"type": "function", "function": {"name": "other"}}), "'other'"),
        ((None, "required"), "no tools"),
        (([], {"type": "function", "function": {"name": "clock"}}), "no tools"),
    ],
)
def test_tools_that_make_no_sense_are_refused(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        parse_tools(*arguments)


# Prompts

CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Malmö"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
    {"role": "user", "content": "And now?"},
]


def test_a_template_that_knows_tools_gets_them() -> None:
    for template in ("{% for t in tools %}{{ t }}{% endfor %}", {"default": "x", "tool_use": "{{ tools }}"}):
        before = json.dumps(CONVERSATION)
        rendered = render_tools(Template(template), CONVERSATION, parse([WEATHER]))
        assert rendered.variables == {"tools": [WEATHER]}
        assert rendered.messages[1]["tool_calls"][1]["function"]["arguments"] == {"city": "Malmö"}
        assert rendered.messages[2:] == CONVERSATION[2:]
        assert json.dumps(CONVERSATION) == before
    assert render_tools(Template("{{ tools }}"), CONVERSATION).variables == {}


def test_other_templates_get_text() -> None:
    rendered = render_tools(Template("{{ toolset }}"), CONVERSATION, parse([WEATHER, CLOCK]))
    assert rendered.variables == {}
    assert [m["role"] for m in rendered.messages] == ["system", "user", "assistant", "user", "user"]
    assert all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in rendered.messages)
    listed = rendered.messages[0]["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.split("\n")] == [WEATHER, CLOCK]
    parser = ToolParser()
    parser.push(rendered.messages[2]["content"])
    parser.finish()
    assert [c["function"]["name"] for c in parser.tool_calls] == ["clock", "get_weather"]
    assert json.loads(parser.tool_calls[1]["function"]["arguments"]) == {"city": "Malmö"}
    assert "12:00" in rendered.messages[3]["content"]
    assert "sun" in rendered.messages[3]["content"]


def test_instructions_join_the_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {x}"}]
    found = render_tools(Template("x"), messages, parse([CLOCK])).messages
    assert [m["role"] for m in found] == ["system", "user"]
    assert found[0]["content"].startswith("Be brief.\n\n")
    assert render_tools(Template("x"), messages).messages == messages


@pytest.mark.parametrize("template", ["x", "{{ tools }}"])
@pytest.mark.parametrize("arguments", ["{", "[]", "5", "[" * 100_000, 5])
def test_earlier_calls_without_an_object_are_refused(template: str, arguments: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(PromptError, match="'f'"):
        render_tools(Template(template), [{"role": "assistant", "tool_calls": [call]}])


# Parser


def pieces(parser: ToolParser, texts: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """What a client that joins the deltas ends with."""
    content, calls = "", list[dict[str, Any]]()
    for delta in [*(parser.push(text) for text in texts), parser.finish()]:
        content += delta.content
        indices = [call["index"] for call in delta.tool_calls]
        assert indices == sorted(set(indices))  # clients merge what a chunk says of a call only once
        for call in delta.tool_calls:
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call["index"] == len(calls) - 1
                assert set(call["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    assert (parser.content, parser.tool_calls) == (content, calls)
    return content, calls


def numbered() -> ToolParser:
    ids = iter(range(1000))
    return ToolParser(lambda: f"call_{next(ids)}")


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]</tool_call>\n\té'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    call_text, st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text(max_size=4), JSON, max_size=3)
)
LOOSE = st.text(' \n<>/tol_ca{}"name:', max_size=12) | st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", ',
        '"arguments": {',
        "Hello.",
        '<tool_call>{"name":"f","arguments":{}}',
    ]
)


@given(st.lists(CALLS | LOOSE, max_size=6).map("".join), st.lists(st.integers(0, 500), max_size=30))
@example("<tool_call>" * 2, [3, 5])
@example('<tool_call>{"name": "f", "arguments": {"a": "\t\x01"}', [40, 41])
def test_the_result_does_not_depend_on_the_cuts(text: str, places: list[int]) -> None:
    whole = pieces(numbered(), [text])
    assert pieces(numbered(), cut(text, places)) == whole
    assert pieces(numbered(), list(text)) == whole


@given(
    st.lists(st.tuples(st.sampled_from(["f", "g-2"]), st.dictionaries(st.text(), JSON, max_size=3)), max_size=4),
    st.text("ab <>\n"),
)
def test_calls_and_content_are_found(calls: list[tuple[str, dict[str, Any]]], content: str) -> None:
    text = content + "\n".join(call_text(*call) for call in calls)
    found_content, found = pieces(numbered(), list(text))
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found] == calls
    assert len({c["id"] for c in found}) == len(calls)
    assert found_content == (content if content.strip() or not calls else "")


def test_every_prefix_of_a_call_keeps_what_it_has() -> None:
    text = call_text("get_weather", {"city": "Oslo", "days": [1, {"a": '}"'}]})
    arguments = json.dumps({"city": "Oslo", "days": [1, {"a": '}"'}]})
    for end in range(len(text) + 1):
        content, calls = pieces(numbered(), [text[:end]])
        if calls:
            assert content == ""
            assert arguments.startswith(calls[0]["function"]["arguments"])
        else:
            assert content == text[:end]
    assert calls[0]["function"]["arguments"] == arguments


def test_control_characters_in_arguments_are_escaped() -> None:
    _, calls = pieces(numbered(), ['<tool_call>{"name": "f", "arguments": {"a":\t"x\ty\x01"}}</tool_call>'])
    assert json.loads(calls[0]["function"]["arguments"]) == {"a": "x\ty\x01"}


def test_what_is_no_call_stays_content() -> None:
    for text in (
        "<tool_call>hello</tool_call> you",
        "a < b",
        "<tool_call",
        '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
    ):
        assert pieces(numbered(), [text]) == (text, [])


def test_finish_reasons() -> None:
    parser = ToolParser()
    assert parser.finish_reason("stop") == "stop"
    parser.push(call_text("f", {}))
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"
    assert parser.tool_calls[0]["id"].startswith("call_")
    assert ToolParser().push(call_text("f", {})).tool_calls[0]["id"] != parser.tool_calls[0]["id"]


# With a model


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "clock"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_of_a_random_model_are_valid(model: LoadedModel, choice: Any, parallel: bool) -> None:
    """With "auto" the beginning of a call is put into the model's mouth; the rest is its own."""
    compiler = GrammarCompiler(model.tokenizer, model.spec.vocab, model.spec.eos_token_ids)
    lane = build_lane(model.decoder, "none", build_method("none"), 32)
    engine = Engine(model.decoder, model.tokenizer, [lane], EngineConfig(2**23))
    grammar = parse([WEATHER, CLOCK], choice, parallel).grammar(compiler)
    done: dict[str, Any] = {}
    start = model.tokenizer.convert_tokens_to_ids(list("<tool_call>")) if choice == "auto" else []
    for seed in range(4):
        request_id = engine.add_request([seed + 3], SamplingParams(seed=seed, max_tokens=150), grammar=grammar)
        sequence = engine._requests[request_id].sequences[0]
        for token in start:
            engine._append(sequence, token, None)
    while engine.has_unfinished:
        done |= {output.request_id: output for output in engine.step()}
    ended = [output.outputs[0] for output in done.values() if output.outputs[0].finish_reason == "stop"]
    assert ended
    for output in ended:
        parser = ToolParser()
        parser.push(output.text)
        parser.finish()
        assert len(parser.tool_calls) == 1 if not parallel or isinstance(choice, dict) else parser.tool_calls
        for call in parser.tool_calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, PARAMETERS if name == "get_weather" else {"const": {}})
            assert choice in ("auto", "required") or name == "clock"
        assert choice == "auto" or not parser.content
