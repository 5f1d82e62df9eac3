"""The official client, as users have it, against the real command."""

import asyncio
import math

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import METHODS
from tests.server.running import RunningServer

MESSAGES = [{"role": "user", "content": "A page belongs to one sequence."}]


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: OpenAI, **options):
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0.0, **options}
    return client.chat.completions.create(**settings)


def test_answers_and_counts(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 12
    assert usage.kv["method"] == "none"
    assert usage.kv["bytes"] > 0


@pytest.mark.parametrize("kv", METHODS)
def test_stream_is_the_whole_answer_in_pieces(client: OpenAI, kv: str) -> None:
    options = {"seed": 3, "temperature": 1.0, "max_tokens": 30, "extra_body": {"kv": kv}}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.usage is None for c in chunks[:-1])
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.kv["method"] == kv
    assert len({c.id for c in chunks}) == 1


def test_method_per_request_frees_memory(client: OpenAI) -> None:
    long = [{"role": "user", "content": "the scheduler admits a request when its pages fit " * 30}]
    dense, compressed = (
        ask(client, messages=long, max_tokens=4, extra_body={"kv": kv, "ignore_eos": True}).usage.kv for kv in METHODS
    )
    assert dense["dense_bytes"] == compressed["dense_bytes"]
    assert compressed["bytes"] < dense["bytes"]
    assert compressed["compression"] > 1


def test_methods_share_a_batch_and_answer_as_alone(server: RunningServer) -> None:
    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            jobs = [
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=20, seed=i, extra_body={"kv": METHODS[i % 2]}
                )
                for i in range(8)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*jobs)]

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    alone = [
        ask(client, temperature=1.0, max_tokens=20, seed=i, extra_body={"kv": METHODS[i % 2]})
        .choices[0]
        .message.content
        for i in range(8)
    ]
    assert asyncio.run(together()) == alone
    assert len(set(alone)) > 1


def test_logprobs(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 5
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
        assert math.fsum(math.exp(t.logprob) for t in token.top_logprobs) <= 1 + 1e-5
    shown = tokens if answer.choices[0].finish_reason == "length" else tokens[:-1]
    joined = b"".join(bytes(t.bytes) for t in shown).decode(errors="replace")
    assert joined == answer.choices[0].message.content


def test_n_choices_differ_and_repeat(client: OpenAI) -> None:
    first, second = (ask(client, n=3, seed=5, temperature=1.5, max_tokens=16) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c.message.content for c in second.choices]


def test_stop_and_bias(client: OpenAI) -> None:
    text = ask(client, max_tokens=40).choices[0].message.content
    stop = text[5:8]
    stopped = ask(client, max_tokens=40, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    banned = ask(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
    token_id = httpx.post(f"{client.base_url}tokenize", json={"prompt": banned}).json()["tokens"][0]
    other = ask(client, max_tokens=1, logprobs=True, logit_bias={str(token_id): -100})
    assert other.choices[0].logprobs.content[0].token != banned


def test_plain_completions(client: OpenAI) -> None:
    prompts = ["Keys and values", "Two requests with"]
    both = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, echo=True, logprobs=2)
    assert [c.index for c in both.choices] == [0, 1]
    for prompt, choice in zip(prompts, both.choices, strict=True):
        alone = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert choice.text == prompt + alone.choices[0].text
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
        chunks = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == alone.choices[0].text
    ids = httpx.post(f"{client.base_url}tokenize", json={"prompt": prompts[0]}).json()["tokens"]
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert prompts[0] + by_ids.choices[0].text == both.choices[0].text


def test_errors_have_the_clients_types(client: OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="zeroc"):
        ask(client, extra_body={"kv": "kivi(bits=2)"})
    with pytest.raises(openai.BadRequestError, match="takes 2048 tokens") as long:
        ask(client, messages=[{"role": "user", "content": "page " * 2200}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="not supported"):
        ask(client, extra_body={"functions": [{"name": "f"}]})


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


def test_async_stream_closed_early_is_cancelled(server: RunningServer) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()

    before = server.wait_idle()["generated_tokens"]
    asyncio.run(leave())
    assert server.wait_idle()["generated_tokens"] - before < 400


def test_prefixes_are_shared_between_requests(client: OpenAI, server: RunningServer) -> None:
    question = [{"role": "user", "content": "what is sealed stays as it is " * 6}]
    first = ask(client, messages=question)
    again = ask(client, messages=[*question, {"role": "assistant", "content": "Yes."}, *MESSAGES])
    # Other tests asked this server before: a first token in common with one of theirs is shared too.
    half = first.usage.prompt_tokens // 2
    assert first.usage.prompt_tokens_details.cached_tokens < half
    assert again.usage.prompt_tokens_details.cached_tokens > half
