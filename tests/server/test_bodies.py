"""Random bodies, valid and nearly so: a well-formed answer that streams as the same text, or a refusal."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.hostile import assert_error
from tests.server.running import RunningServer

BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
LEAST_ANSWERED = 10  # of the examples: else the test says nothing
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(["A page", "of keys\n", "🦜é"])
JUNK = st.sampled_from([None, -1, 0, 3, 1.5, 10**20, "x", "", True, [], {}, [None], {"a": 1}, "\0"])


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


SAMPLING = {
    "n": st.integers(1, 3),
    "temperature": number(0, 2),
    "top_p": number(0.1, 1),
    "top_k": st.integers(-1, 50),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.1, 2),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.sampled_from(["e", " "]) | st.lists(st.sampled_from(["a", "th", "e", "\n", "🦜"]), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 383), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "max_tokens": st.integers(1, 12),
    "min_tokens": st.integers(0, 8),
    "logit_bias": st.dictionaries(st.integers(0, 383).map(str), number(-100, 100), max_size=3),
    "kv": st.sampled_from(["none", "zeroc(bits=4)"]),
    "user": TEXTS,
    "unknown_field": JUNK,
}
ROLES = st.sampled_from(["system", "user", "assistant", "developer"])
CHAT = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": TEXTS}
        ),
        min_size=1,
        max_size=3,
    ),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 5),
}
COMPLETION = {
    "prompt": TEXTS
    | st.lists(TEXTS, min_size=1, max_size=3)
    | st.lists(st.integers(0, 383), min_size=1, max_size=9)
    | st.lists(st.lists(st.integers(0, 383), min_size=1, max_size=9), min_size=1, max_size=3),
    "logprobs": st.integers(0, 5),
    "echo": st.booleans(),
}


@st.composite
def bodies(draw: st.DrawFn, fields: dict[str, Any], needed: str) -> dict[str, Any]:
    """Some of the fields; in a third of the bodies one of them holds something else."""
    optional = {name: value for name, value in {**SAMPLING, **fields}.items() if name != needed}
    names = draw(st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=6))
    body = {"seed": 1, "max_tokens": 8, needed: draw(fields[needed]), **{name: draw(optional[name]) for name in names}}
    if draw(st.integers(0, 2)) == 0:
        body[draw(st.sampled_from(sorted(body)))] = draw(JUNK)
    # null is the same as leaving these out, and then no two answers are the same or one is as long as can be
    return {**body, "seed": 1 if body["seed"] is None else body["seed"], "max_tokens": body["max_tokens"] or 8}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.wait_idle()


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of the same answer, with the usage."""
    response = client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks.pop()["choices"] == [] or pytest.fail("the last chunk has no usage")
    return chunks


def check_counts(body: dict[str, Any], answer: dict[str, Any], prompts: int) -> None:
    choices, usage = answer["choices"], answer["usage"]
    assert [choice["index"] for choice in choices] == list(range(prompts * (body.get("n") or 1)))
    assert usage["completion_tokens"] <= len(choices) * body["max_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["kv"]["method"] == (body.get("kv") or "none")
    assert usage["kv"]["bytes"] > 0


def check_stops(body: dict[str, Any], texts: list[str]) -> None:
    stops = body.get("stop") or []
    if not body.get("include_stop_str_in_output") and not body.get("min_tokens"):
        for stop in [stops] if isinstance(stops, str) else stops:
            assert not any(stop in text for text in texts)


def test_chat(client: httpx.Client) -> None:
    answered = []

    @given(body=bodies(CHAT, "messages"))
    @BOUNDED
    def run(body: dict[str, Any]) -> None:
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            assert_error(response, 400, 404)
            return
        answered.append(body)
        answer = ChatCompletion.model_validate(response.json(), strict=True)
        check_counts(body, response.json(), prompts=1)
        texts = [choice.message.content or "" for choice in answer.choices]
        check_stops(body, texts)
        logprobs = [choice.logprobs for choice in answer.choices]
        if body.get("logprobs"):
            tokens = [entry.content or [] for entry in logprobs if entry is not None]
            assert sum(map(len, tokens)) == response.json()["usage"]["completion_tokens"]
            for token in chain.from_iterable(tokens):
                assert len(token.top_logprobs) == (body.get("top_logprobs") or 0)
        else:
            assert logprobs == [None] * len(texts)
        joined = [""] * len(texts)
        for chunk in stream(client, "/v1/chat/completions", body):
            for choice in ChatCompletionChunk.model_validate(chunk, strict=True).choices:
                joined[choice.index] += choice.delta.content or ""
        assert joined == texts

    run()
    assert len(answered) > LEAST_ANSWERED


def test_completions(client: httpx.Client) -> None:
    answered = []

    @given(body=bodies(COMPLETION, "prompt"))
    @BOUNDED
    def run(body: dict[str, Any]) -> None:
        response = client.post("/v1/completions", json=body)
        if response.status_code != 200:
            assert_error(response, 400, 404)
            return
        answered.append(body)
        answer = Completion.model_validate(response.json(), strict=True)
        prompt = body["prompt"]
        check_counts(
            body,
            response.json(),
            prompts=len(prompt) if isinstance(prompt[0], str | list) and isinstance(prompt, list) else 1,
        )
        texts = [choice.text for choice in answer.choices]
        if not body.get("echo"):
            check_stops(body, texts)
        usage = response.json()["usage"]
        if body.get("logprobs") is not None:
            n = body.get("n") or 1
            tokens = usage["completion_tokens"] + (usage["prompt_tokens"] * n if body.get("echo") else 0)
            shown = [choice.logprobs for choice in answer.choices if choice.logprobs is not None]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert sum(len(getattr(entry, name)) for entry in shown) == tokens
        joined = [""] * len(texts)
        for chunk in stream(client, "/v1/completions", body):
            for choice in chunk["choices"]:
                joined[choice["index"]] += choice["text"]
        assert joined == texts

    run()
    assert len(answered) > LEAST_ANSWERED
