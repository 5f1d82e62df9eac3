"""From generated text to content and tool calls, piece by piece, in OpenAI's shape."""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvfold.engine.outputs import FinishReason

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NAMED = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"')
_HEAD = re.compile(_NAMED.pattern + r'\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass
class ToolDelta:
    """What a piece of text adds. tool_calls: `delta.tool_calls` of OpenAI's stream; names come once, arguments in
    pieces that join to their JSON text."""

    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ToolParser:
    """Reads one completion. The joined result does not depend on how the text was cut into pieces.

    What is not a call of the form `<tool_call>{"name": "...", "arguments": {...}}</tool_call>` stays content; blanks
    around calls are dropped.

    Attributes:
        content: all content so far.
        tool_calls: all calls so far, as in a message: id, type, function with name and arguments (JSON text).
    """

    def __init__(self, new_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}") -> None:
        self._new_id = new_id
        self._state: Callable[[ToolDelta], bool] = self._in_content
        self._buffer = ""  # text that is not settled yet
        self._blank = ""  # blanks that are content only if more content follows them
        self._fresh = True  # nothing but blanks since the beginning or the last call
        self._depth, self._quoted, self._escaped = 0, False, False
        self.content = ""
        self.tool_calls: list[dict[str, Any]] = []

    def push(self, text: str) -> ToolDelta:
        """Adds text and returns what is new."""
        delta = ToolDelta()
        self._buffer += text
        while self._state(delta):
            pass
        self.content += delta.content
        return delta

    def finish(self) -> ToolDelta:
        """End of the text: returns what was held back. A call that was cut off keeps what it has."""
        delta = ToolDelta()
        if self._state == self._in_content:
            self._say(self._buffer, delta)
        elif self._state == self._in_head:
            named = _NAMED.match(self._buffer)
            if named is not None:
                self._begin(named[1], delta)
            else:
                self._say(_OPEN + self._buffer, delta)
        if not self.tool_calls:
            delta.content += self._blank
        self._buffer = self._blank = ""
        self.content += delta.content
        return delta

    def finish_reason(self, reason: FinishReason) -> str:
        """OpenAI's word: an answer that stopped after calls is `tool_calls`."""
        return "tool_calls" if reason == "stop" and self.tool_calls else reason

    def _in_content(self, delta: ToolDelta) -> bool:
        before, tag, after = self._buffer.partition(_OPEN)
        if tag:
            self._say(before, delta)
            self._buffer, self._state = after, self._in_head
            return True
        held = next(n for n in range(len(_OPEN) - 1, -1, -1) if self._buffer.endswith(_OPEN[:n]))
        end = len(self._buffer) - held
        self._say(self._buffer[:end], delta)
        self._buffer = self._buffer[end:]
        return False

    def _in_head(self, delta: ToolDelta) -> bool:
        head = _HEAD.match(self._buffer)
        if head is not None:
            self._begin(head[1], delta)
            self._buffer, self._state = self._buffer[head.end() :], self._in_arguments
            return True
        before, tag, after = self._buffer.partition(_CLOSE)
        if tag:
            self._say(_OPEN + before + tag, delta)
            self._buffer, self._state = after, self._in_content
        return bool(tag)

    def _in_arguments(self, delta: ToolDelta) -> bool:
        if not self._buffer:
            return False
        piece, end = self._object()
        self._add_arguments(piece, delta)
        self._buffer = self._buffer[end:]
        if self._depth == 0:
            self._state = self._in_end
        return self._depth == 0

    def _in_end(self, delta: ToolDelta) -> bool:
        _, tag, after = self._buffer.partition(_CLOSE)
        self._buffer = after if tag else self._buffer[1 - len(_CLOSE) :]
        if tag:
            self._state = self._in_content
        return bool(tag)

    def _object(self) -> tuple[str, int]:
        """What of the buffer belongs to the arguments, and its length; the nesting is kept from piece to piece.

        Control characters in strings, which the grammar of limited strings lets through, are written as JSON wants.
        """
        written: list[str] = []
        for index, character in enumerate(self._buffer):
            written.append(json.dumps(character)[1:-1] if self._quoted and character < " " else character)
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return "".join(written), index + 1
        return "".join(written), len(self._buffer)

    def _say(self, text: str, delta: ToolDelta) -> None:
        if self._fresh:
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return
        self._fresh = False
        delta.content += text

    def _begin(self, name: str, delta: ToolDelta) -> None:
        self._blank, self._fresh = "", True
        call = {"id": self._new_id(), "type": "function"}
        delta.tool_calls.append({"index": len(self.tool_calls), **call, "function": {"name": name, "arguments": ""}})
        self.tool_calls.append({**call, "function": {"name": name, "arguments": ""}})

    def _add_arguments(self, piece: str, delta: ToolDelta) -> None:
        index = len(self.tool_calls) - 1
        self.tool_calls[-1]["function"]["arguments"] += piece
        if delta.tool_calls and delta.tool_calls[-1]["index"] == index:  # clients expect one entry per call and chunk
            delta.tool_calls[-1]["function"]["arguments"] += piece
        else:
            delta.tool_calls.append({"index": index, "function": {"arguments": piece}})
