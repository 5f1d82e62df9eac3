"""Getting to know a server before it is loaded: its model, its tokenizer, the fields it takes."""

from dataclasses import dataclass
from typing import Any

import httpx2

from kvfold.benchmark.client import PATIENCE, ROUTES, stream_completion
from kvfold.benchmark.counting import EstimatedCounter, TokenCounter, find_counter
from kvfold.benchmark.dialect import Dialect, dialects
from kvfold.benchmark.errors import BenchmarkError
from kvfold.benchmark.options import TargetOptions
from kvfold.benchmark.outcome import Outcome
from kvfold.config.suggest import suggest

SHORT_TEXT = "The quick brown fox jumps over the lazy dog."
LONG_TEXT = " ".join([SHORT_TEXT] * 8)
TOKENS_PER_CHARACTER = 0.25
"""Of English text in usual tokenizers, where a server tells nothing at all."""


@dataclass(frozen=True)
class Server:
    """What a server told. context: most tokens of prompt and answer; overhead: tokens its chat template adds."""

    model: str
    context: int | None
    dialect: Dialect
    counter: TokenCounter
    overhead: int


async def probe(http: httpx2.AsyncClient, target: TargetOptions) -> Server:
    """Ask for the models and send a few requests of one token, at least one for each method.

    Raises BenchmarkError if the server cannot be reached, lacks the model or refuses what is to be measured.
    """
    model, context = await _find_model(http, target)
    methods: list[str | None] = list(target.kv) or [None]
    dialect, short = await _find_dialect(http, target, model, methods[0])
    for kv in methods[1:]:
        await _require(http, target, dialect, model, kv)
    counter = await find_counter(http, model)
    if counter is not None:
        contexts = [known for known in (context, counter.context) if known is not None]
        prompt = short.prompt_tokens
        overhead = 0 if prompt is None else prompt - await counter.count(SHORT_TEXT)
        return Server(model, min(contexts, default=None), dialect, counter, max(0, overhead))
    long = await _require(http, target, dialect, model, methods[0], LONG_TEXT)
    estimate, overhead = _estimate(short.prompt_tokens, long.prompt_tokens)
    return Server(model, context, dialect, EstimatedCounter(estimate), overhead)


async def _find_model(http: httpx2.AsyncClient, target: TargetOptions) -> tuple[str, int | None]:
    models = await _models(http, target.url)
    if models is None:
        if target.model is None:
            raise BenchmarkError(f"{target.url} does not list its models; name one with --model")
        return target.model, None
    name = next(iter(models), None) if target.model is None else target.model
    if name is None:
        raise BenchmarkError(f"{target.url} serves no model; load one there or name one with --model")
    if name not in models:
        near = suggest(name, models) or f"; it serves {', '.join(list(models)[:5]) or 'none'}"
        raise BenchmarkError(f"{target.url} has no model {name!r}{near}")
    return name, models[name]


async def _models(http: httpx2.AsyncClient, url: str) -> dict[str, int | None] | None:
    """Names of the models and their contexts, as far as told; None if the server has no such list."""
    try:
        response = await http.get("/v1/models")
    except httpx2.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise BenchmarkError(f"no server answers at {url} ({reason}); start one or correct --url") from error
    _check_access(response.status_code)
    if response.status_code != 200:
        return None
    try:
        entries = response.json()["data"]
        return {str(entry["id"]): _context(entry) for entry in entries}
    except (ValueError, KeyError, TypeError):
        return None


def _context(entry: dict[str, Any]) -> int | None:
    length = entry.get("max_model_len")
    return length if type(length) is int else None


def _check_access(status: int) -> None:
    if status in (401, 403):
        raise BenchmarkError("the server wants another API key; give --api-key KEY or set KVFOLD_API_KEY")


async def _find_dialect(
    http: httpx2.AsyncClient, target: TargetOptions, model: str, kv: str | None
) -> tuple[Dialect, Outcome]:
    """The richest dialect that the server takes, and what it answered in it."""
    failures = []
    for dialect in dialects(target.ignore_eos):
        outcome = await _ask(http, target, dialect, model, kv)
        if outcome.succeeded:
            return dialect, outcome
        failures.append(outcome)
        if outcome.error != "4xx":
            break  # not the fields' fault
    raise _refused(target, kv, failures[0])


async def _require(
    http: httpx2.AsyncClient,
    target: TargetOptions,
    dialect: Dialect,
    model: str,
    kv: str | None,
    prompt: str = SHORT_TEXT,
) -> Outcome:
    outcome = await _ask(http, target, dialect, model, kv, prompt)
    if not outcome.succeeded:
        raise _refused(target, kv, outcome)
    return outcome


async def _ask(
    http: httpx2.AsyncClient,
    target: TargetOptions,
    dialect: Dialect,
    model: str,
    kv: str | None,
    prompt: str = SHORT_TEXT,
) -> Outcome:
    outcome = Outcome(0, 0, 1, 0.0)
    body = dialect.body(target.endpoint, model, kv, prompt, 1)
    await stream_completion(http, ROUTES[target.endpoint], body, outcome, timeout=max(PATIENCE, target.timeout))
    _check_access(int((outcome.detail or "")[:3]) if outcome.error == "4xx" else 0)
    return outcome


def _refused(target: TargetOptions, kv: str | None, outcome: Outcome) -> BenchmarkError:
    what = f"{target.endpoint} requests" + (f" with --kv {kv!r}" if kv is not None else "")
    detail = (outcome.detail or outcome.error or "").rstrip(".")
    return BenchmarkError(f"the server does not answer {what} ({detail}); correct the options or the server")


def _estimate(short: int | None, long: int | None) -> tuple[float, int]:
    """Tokens per character and tokens of the template, from the usage of two prompts."""
    if short is None or long is None or long <= short:
        return TOKENS_PER_CHARACTER, 0
    slope = (long - short) / (len(LONG_TEXT) - len(SHORT_TEXT))
    return slope, max(0, round(short - slope * len(SHORT_TEXT)))
