"""Tools and response formats through the official client: what comes back must be valid, whatever the model."""

import json

import jsonschema
import openai
import pytest
from openai import OpenAI

from tests.server.conftest import METHODS
from tests.server.running import RunningServer

MESSAGES = [{"role": "user", "content": "A page belongs to one sequence."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: OpenAI, **options):
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 300, "temperature": 1.0, "seed": 1, **options}
    return client.chat.completions.create(**settings)


@pytest.mark.parametrize("kv", METHODS)
def test_json_schema(client: OpenAI, kv: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        choice = ask(client, response_format=wanted, seed=seed, extra_body={"kv": kv}).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_required_call_streams_as_it_comes_whole(client: OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "n": 2}
    whole = ask(client, **options)
    joined: dict[int, dict[str, str]] = {}
    reasons = {}
    for chunk in ask(client, stream=True, **options):
        choice = chunk.choices[0]
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            known = joined.setdefault(choice.index, {"name": "", "arguments": ""})
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
    for choice in whole.choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" == reasons[choice.index]
        assert choice.message.content is None
        assert joined[choice.index] == {"name": call.function.name, "arguments": call.function.arguments}
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA if call.function.name == "weather" else {})


def test_named_call_and_its_answer(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    message = ask(client, tools=TOOLS, tool_choice=named).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    turn = [*MESSAGES, message.model_dump(exclude_none=True)]
    turn.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    assert (
        ask(client, messages=turn, tools=TOOLS, tool_choice="none", max_tokens=5).choices[0].message.tool_calls is None
    )


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tools"),
        ({"tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}},
            "response_format",
        ),
    ],
)
def test_what_makes_no_sense_is_a_400(client: OpenAI, options: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **options)
    assert error.value.param == param
