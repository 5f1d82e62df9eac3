"""Tools and earlier calls in the messages of a chat: for templates that know them, and as text for others."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.errors import PromptError

Messages = Sequence[Mapping[str, Any]]

_INSTRUCTIONS = """You may call functions to answer the user. These are their signatures, as JSON:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as JSON within <tool_call> tags, like this:
<tool_call>
{{"name": <function name>, "arguments": <object of arguments>}}
</tool_call>"""


def tools_for_template(messages: Messages) -> list[dict[str, Any]]:
    """Copies of the messages with the arguments of earlier calls as objects, which is what templates expect."""
    return [
        {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def tools_as_text(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with roles and texts alone (Hermes' manner): tools in the system message, calls in the assistant's
    text, results, those in a row together, as the user's."""
    written: list[dict[str, Any]] = []
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"<tool_response>\n{message.get('content') or ''}\n</tool_response>")
            continue
        _flush(results, written)
        text = message.get("content")
        if message.get("tool_calls"):
            calls = [_call_text(call) for call in message["tool_calls"]]
            text = "\n".join([*([text] if text else []), *calls])
        kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        written.append({**kept, "content": text if text is not None else ""})
    _flush(results, written)
    if tools:
        _instruct(written, tools)
    return written


def _flush(results: list[str], written: list[dict[str, Any]]) -> None:
    if results:
        written.append({"role": "user", "content": "\n".join(results)})
        results.clear()


def _instruct(written: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
    text = _INSTRUCTIONS.format(tools="\n".join(_json(tool) for tool in tools))
    if written and written[0].get("role") in ("system", "developer") and isinstance(written[0]["content"], str):
        written[0] = {**written[0], "content": f"{written[0]['content']}\n\n{text}"}
    else:
        written.insert(0, {"role": "system", "content": text})


def _call_text(call: Mapping[str, Any]) -> str:
    function = _parsed(call)["function"]
    return f"<tool_call>\n{_json({'name': function['name'], 'arguments': function['arguments']})}\n</tool_call>"


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise PromptError('an earlier tool call has no name; give {"function": {"name": ..., "arguments": ...}}')
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"the arguments of an earlier call of {name[:80]!r} are not JSON; give an object"
            ) from error
    if arguments is not None and not isinstance(arguments, Mapping):
        raise PromptError(f"the arguments of an earlier call of {name[:80]!r} are no JSON object; give one")
    return {**call, "function": {**function, "arguments": dict(arguments or {})}}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
