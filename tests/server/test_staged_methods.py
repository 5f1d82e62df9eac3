"""Methods that drop tokens, chosen per request, with the context marked or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TINY_TEXT
from tests.server.running import RunningServer

WINDOW = "streaming(window=64)"
AGNOSTIC = 'snapkv(budget=64,compress="context")'
AWARE = "h2o(budget=64)+int8(recent=16)"
DOCUMENT = TINY_TEXT * 4


@pytest.fixture(scope="module")
def url(tiny_model: Path, server_cache: Path) -> Iterator[str]:
    options = [part for method in ("none", WINDOW, AGNOSTIC, AWARE) for part in ("--kv", method)]
    with RunningServer(
        tiny_model, *options, "--kv-memory", "16MiB", "--served-model-name", "tiny", cache=server_cache
    ) as server:
        yield server.url
        server.wait_idle()


def post(url: str, path: str, **body: Any) -> httpx.Response:
    defaults = {"model": "tiny", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return httpx.post(f"{url}/v1/{path}", json={**defaults, **body}, timeout=60)


@pytest.mark.parametrize("kv", [WINDOW, AWARE])
def test_what_is_dropped_is_no_longer_held(url: str, kv: str) -> None:
    held = {}
    for method in ("none", kv):
        answer = post(url, "completions", prompt=DOCUMENT, kv=method)
        assert answer.status_code == 200, answer.text
        held[method] = answer.json()["usage"]["kv"]["bytes"]
    assert held[kv] < held["none"] / 2


def test_a_context_is_compressed_before_the_question_and_kept_for_the_next_one(url: str) -> None:
    cached, held = [], []
    for question in ("Which page?", "What stays?"):
        answer = post(url, "completions", context=DOCUMENT, prompt=question, kv=AGNOSTIC)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        held.append(usage["kv"]["compression"])
    assert cached[0] == 0 < cached[1]
    assert min(held) > 2


def test_a_context_may_be_marked_in_token_ids(url: str) -> None:
    ids = httpx.post(f"{url}/v1/tokenize", json={"prompt": DOCUMENT}, timeout=60).json()["tokens"]
    answer = post(url, "completions", prompt=[*ids, 5, 6, 7], context_tokens=len(ids), kv=AGNOSTIC)
    assert answer.json()["usage"]["kv"]["compression"] > 2
    for wrong in ({"context_tokens": len(ids) + 4}, {"context_tokens": 3, "context": "x"}, {"context_tokens": 0}):
        refused = post(url, "completions", prompt=[*ids, 5, 6, 7], kv=AGNOSTIC, **wrong)
        assert refused.status_code in (400, 422)


def test_in_a_chat_the_context_is_all_before_the_last_message(url: str) -> None:
    document = [{"role": "system", "content": DOCUMENT}]
    answers = [
        post(url, "chat/completions", messages=[*document, {"role": "user", "content": question}], kv=AGNOSTIC)
        for question in ("Which page?", "What stays?")
    ]
    usages = [answer.json()["usage"] for answer in answers]
    assert usages[0]["prompt_tokens"] - 60 < usages[1]["prompt_tokens_details"]["cached_tokens"]


def test_a_missing_context_is_refused_with_what_to_do(url: str) -> None:
    for path, body in (
        ("completions", {"prompt": DOCUMENT}),
        ("chat/completions", {"messages": [{"role": "user", "content": DOCUMENT}]}),
    ):
        answer = post(url, path, **body, kv=AGNOSTIC)
        assert answer.status_code == 400
        assert 'compress="prompt"' in answer.json()["error"]["message"]
