"""Traces of real services: when requests came and how long they were.

Two published formats: Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`; Patel et al., Splitwise, 2024) and
Mooncake's JSONL (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`; Qin et al., FAST 2025).
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from kvfold.benchmark.errors import TraceError

BLOCK_TOKENS = 512
"""Prompt tokens that one entry of Mooncake's `hash_ids` stands for."""

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")
MOST_TOKENS = 2**31


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    at: seconds. input_tokens, output_tokens: at least 1. hash_ids: one id for each `block_tokens` tokens of the
    prompt (the last block may be shorter); equal ids mean equal text. Empty where the trace says nothing.
    """

    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS


def read_trace(path: Path, first: int = 0, count: int | None = None) -> list[TraceRequest]:
    """Requests `first` to `first + count` of a trace, by time, the first of them at 0 seconds.

    Lines after the wanted part are not read. Raises TraceError for a malformed line (named) or an empty part.
    """
    parse: Callable[[Iterable[str]], Iterator[TraceRequest]] = _azure if path.suffix.lower() == ".csv" else _mooncake
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            part = list(islice(parse(lines), first, None if count is None else first + count))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}; check --trace") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"the trace {path} is no UTF-8 text; give a CSV or JSONL file") from error
    except _MalformedLine as error:
        raise TraceError(f"{path}, line {error.line}: {error}; correct that line or give another --trace") from error
    if not part:
        raise TraceError(f"the trace {path} has no request from number {first} on; lower --from")
    part.sort(key=lambda request: request.at)
    return [replace(request, at=request.at - part[0].at) for request in part]


class _MalformedLine(Exception):
    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def _azure(lines: Iterable[str]) -> Iterator[TraceRequest]:
    rows = csv.reader(lines)
    try:
        header = next(rows, [])
        if tuple(name.strip() for name in header[:3]) != AZURE_COLUMNS:
            raise _MalformedLine(1, f"the header is not {','.join(AZURE_COLUMNS)}")
        for row in rows:
            if not row:
                continue
            if len(row) < len(AZURE_COLUMNS):
                raise _MalformedLine(rows.line_num, f"{len(row)} columns instead of {len(AZURE_COLUMNS)}")
            try:
                at = datetime.fromisoformat(row[0].strip()).timestamp()
            except (ValueError, OverflowError, OSError) as error:
                raise _MalformedLine(rows.line_num, f"{row[0]!r} is no time") from error
            prompt, generated = (_tokens(row[i], AZURE_COLUMNS[i], rows.line_num) for i in (1, 2))
            yield TraceRequest(at, prompt, generated)
    except csv.Error as error:
        raise _MalformedLine(rows.line_num, f"no CSV ({error})") from error


def _mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _MalformedLine(number, "no JSON") from error
        if not isinstance(fields, dict):
            raise _MalformedLine(number, "no JSON object")
        missing = [name for name in MOONCAKE_FIELDS if name not in fields]
        if missing:
            raise _MalformedLine(number, f"{missing[0]!r} is missing")
        timestamp = fields["timestamp"]
        if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not math.isfinite(timestamp):
            raise _MalformedLine(number, "'timestamp' is no number of milliseconds")
        if timestamp < 0:
            raise _MalformedLine(number, f"'timestamp' {timestamp} is negative")
        prompt, generated = (_tokens(fields[name], name, number) for name in MOONCAKE_FIELDS[1:])
        yield TraceRequest(timestamp / 1000, prompt, generated, _hash_ids(fields.get("hash_ids", []), prompt, number))


def _hash_ids(value: Any, input_tokens: int, line: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _MalformedLine(line, "'hash_ids' is no list of integers")
    blocks = -(-input_tokens // BLOCK_TOKENS)
    if value and len(value) != blocks:
        raise _MalformedLine(line, f"{len(value)} hash_ids for {input_tokens} tokens, which are {blocks} blocks")
    return tuple(value)


def _tokens(value: Any, name: str, line: int) -> int:
    """A number of tokens; 0 becomes 1, because no server generates nothing."""
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if type(number) is not int or not 0 <= number < MOST_TOKENS:
        raise _MalformedLine(line, f"{name} {value!r} is no number of tokens")
    return max(number, 1)
