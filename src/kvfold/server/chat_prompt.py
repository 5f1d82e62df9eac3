"""From a chat request to the tokens of its prompt and the grammar of its answer."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.engine.prompts import last_message, render_chat
from kvfold.errors import GrammarError, PromptError
from kvfold.server.http_errors import APIError
from kvfold.server.protocol import ChatCompletionRequest, Message, ResponseFormat
from kvfold.server.text import Text
from kvfold.server.tools import ToolSet, parse_tools, render_tools


@dataclass(frozen=True)
class ChatPrompt:
    """token_ids: as the chat template writes the conversation; grammar: that the answer must follow, if any;
    tools: those that the answer may call, if any; context: tokens before the last message, if asked for."""

    token_ids: list[int]
    grammar: bytes | None
    tools: ToolSet | None
    context: int | None


async def prepare_chat(text: Text, request: ChatCompletionRequest, needs_context: bool) -> ChatPrompt:
    """Raises APIError (400) for tools, formats and messages that make no sense or that the template refuses."""
    try:
        choice: Any = request.tool_choice
        tools = parse_tools(
            [tool.model_dump() for tool in request.tools or ()],
            choice if choice is None or isinstance(choice, str) else choice.model_dump(),
            request.parallel_tool_calls,
        )
        grammar = await _tool_grammar(text, request, tools)
    except GrammarError as error:
        raise APIError(400, str(error), param="tools") from error
    try:
        grammar = grammar or await _format_grammar(text, request.response_format)
    except GrammarError as error:
        raise APIError(400, str(error), param="response_format") from error
    try:
        token_ids, context = await render(text, request.messages, tools, needs_context=needs_context)
    except PromptError as error:
        raise APIError(400, str(error), param="messages") from error
    return ChatPrompt(token_ids, grammar, tools, context)


async def render(
    text: Text, messages: Sequence[Message], tools: ToolSet | None = None, *, needs_context: bool = False
) -> tuple[list[int], int | None]:
    """Token ids of a conversation as the chat template writes it, and how many come before its last message if that
    is asked for. Raises PromptError where the template refuses."""
    plain = [_plain(message) for message in messages]

    def work() -> tuple[list[int], int | None]:
        rendered = render_tools(text.tokenizer, plain, tools)
        prompt = render_chat(text.tokenizer, rendered.messages, **rendered.variables)
        ids = text.encode_now(prompt, special=False)
        if not needs_context:
            return ids, None
        return ids, last_message(text.tokenizer, rendered.messages, ids, **rendered.variables)

    return await asyncio.to_thread(work)


async def _tool_grammar(text: Text, request: ChatCompletionRequest, tools: ToolSet | None) -> bytes | None:
    if tools is None:
        return None
    if request.response_format is not None and request.response_format.type != "text":
        raise GrammarError("tools and response_format exclude each other; leave one of them out")
    return await text.compile(tools.grammar)


async def _format_grammar(text: Text, wanted: ResponseFormat | None) -> bytes | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return await text.compile(lambda compiler: compiler.json_object())
    body = wanted.json_schema
    if body is None or body.schema_ is None:
        raise GrammarError('response_format has no schema; give {"json_schema": {"name": ..., "schema": {...}}}')
    schema, strict = body.schema_, body.strict is True
    return await text.compile(lambda compiler: compiler.json_schema(schema, strict=strict))


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it: its content is one string, and a developer is a system."""
    shown = message.model_dump(exclude_none=True)
    content = message.content
    shown["content"] = content if isinstance(content, str) else "".join(part.text for part in content or ())
    shown["role"] = "system" if message.role == "developer" else message.role
    return shown
