"""One completion's text as the message of an assistant: plain content, or content and tool calls."""

from typing import Any

from kvfold.engine.outputs import FinishReason
from kvfold.server.tool_parser import ToolParser


class AnswerReader:
    """Takes a text piece by piece; with tools, `<tool_call>` in it begins a call."""

    def __init__(self, with_tools: bool) -> None:
        self._parser = ToolParser() if with_tools else None
        self._content = ""

    def push(self, text: str, last: bool) -> dict[str, Any]:
        """What the text adds to the message, in OpenAI's shape; {} where nothing. last: nothing follows."""
        if self._parser is None:
            self._content += text
            return {"content": text} if text else {}
        shown: dict[str, Any] = {}
        for delta in (self._parser.push(text), *((self._parser.finish(),) if last else ())):
            if delta.content:
                shown["content"] = shown.get("content", "") + delta.content
            if delta.tool_calls:
                shown["tool_calls"] = shown.get("tool_calls", []) + delta.tool_calls
        return shown

    def message(self) -> dict[str, Any]:
        """All of it; the content is null where there are only calls."""
        if self._parser is None:
            return {"content": self._content}
        calls = self._parser.tool_calls
        content = self._parser.content
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """OpenAI's word for why the text ended; None while it goes on."""
        return reason if reason is None or self._parser is None else self._parser.finish_reason(reason)
