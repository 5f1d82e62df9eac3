"""Tools a request may call: what is valid, how the prompt tells of them and how the output is held to them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.engine.grammar import GrammarCompiler, ToolGrammar
from kvfold.engine.json_schema import check_size
from kvfold.errors import GrammarError
from kvfold.server.tool_messages import tools_as_text, tools_for_template

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class RenderedTools:
    """What goes into the chat template: messages, and variables besides them."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]


@dataclass(frozen=True)
class ToolSet:
    """The tools of one request.

    tools: all of them, in OpenAI's shape, for the prompt. callable: those that may be called. required: whether
    one must be. parallel: whether several may be.
    """

    tools: tuple[dict[str, Any], ...]
    callable: tuple[ToolGrammar, ...]
    required: bool = False
    parallel: bool = True

    def grammar(self, compiler: GrammarCompiler) -> bytes:
        """The grammar of the output. Raises GrammarError for parameter schemas that cannot be used."""
        return compiler.tool_calls(self.callable, required=self.required, parallel=self.parallel)


def parse_tools(tools: object, tool_choice: object = None, parallel_tool_calls: bool | None = True) -> ToolSet | None:
    """The tools of a request body (plain JSON values); None where there are none, or none may be called.

    Raises GrammarError for tools or a choice that make no sense.
    """
    if tools is not None and not isinstance(tools, Sequence):
        raise GrammarError("tools is no list; give a list of function tools")
    specs = [_tool(tool) for tool in tools or ()]
    if len(specs) > MAX_TOOLS:
        raise GrammarError(f"there are {len(specs)} tools; give at most {MAX_TOOLS}")
    names = [tool["function"]["name"] for tool in specs]
    if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise GrammarError(f"two tools have the name {twice!r}; give each its own")
    chosen = _chosen(tool_choice, names)
    if tool_choice == "none" or not specs:
        return None
    grammars = tuple(
        ToolGrammar(
            tool["function"]["name"], tool["function"].get("parameters"), strict=tool["function"].get("strict") is True
        )
        for tool in specs
        if chosen is None or tool["function"]["name"] == chosen
    )
    # A call by name is one call, as OpenAI has it.
    parallel = parallel_tool_calls is not False and chosen is None
    return ToolSet(tuple(specs), grammars, tool_choice == "required" or chosen is not None, parallel)


def render_tools(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: ToolSet | None = None) -> RenderedTools:
    """Messages and variables for the model's chat template, so that tools and earlier calls reach the prompt.

    messages: in OpenAI's shape, with contents that are texts or None. A template that knows `tools` gets them and
    the messages, with arguments parsed; for others both are written as text. Raises PromptError for earlier calls
    whose arguments are no JSON object.
    """
    specs = [] if tools is None else list(tools.tools)
    if _knows_tools(tokenizer, specs):
        return RenderedTools(tools_for_template(messages), {"tools": specs} if specs else {})
    return RenderedTools(tools_as_text(messages, specs), {})


def _knows_tools(tokenizer: Any, specs: list[dict[str, Any]]) -> bool:
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):  # several by name; transformers takes `tool_use` where tools are given
        templates = templates.get("tool_use" if specs and "tool_use" in templates else "default")
    return isinstance(templates, str) and re.search(r"\btools\b", templates) is not None


def _tool(tool: object) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
        raise GrammarError('a tool is not understood; give {"type": "function", "function": {"name": ...}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GrammarError(f"tool name {str(name)[:80]!r} is not allowed; use 1 to 64 letters, digits, _ and -")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise GrammarError(f"the parameters of tool {name!r} are no JSON schema; give an object")
    check_size(dict(function))
    # null means the same as a field left out; templates would print it
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _chosen(tool_choice: object, names: list[str]) -> str | None:
    """The tool that must be called, by name; None where the choice is not one of names."""
    if tool_choice in (None, "none", "auto"):
        return None
    if not names:
        raise GrammarError("tool_choice asks for a call but there are no tools; give tools")
    if tool_choice == "required":
        return None
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise GrammarError(
            'tool_choice is not understood; give "none", "auto", "required" or '
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in names:
        raise GrammarError(f"tool_choice names {name[:80]!r}, which is not among the tools; choose one of them")
    return name
