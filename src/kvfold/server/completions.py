"""POST /v1/completions"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from kvfold.server.answering import answer_stream, answer_whole
from kvfold.server.http_errors import APIError
from kvfold.server.messages import Add, Update
from kvfold.server.openapi import Completion, answers
from kvfold.server.prepare import completion_params, new_id
from kvfold.server.protocol import CompletionRequest
from kvfold.server.responses import Choice, Usage, completion_logprobs
from kvfold.server.service import Service
from kvfold.server.text import Text

MOST_COMPLETIONS = 1024  # of one request


def completions_router(service: Service) -> APIRouter:
    """Continues texts, one or several."""
    router = APIRouter(dependencies=[Depends(service.track)])

    @router.post("/v1/completions", responses=answers(Completion, events=True), summary="Continue a text")
    async def create(request: CompletionRequest, http: Request) -> Response:
        job = await _prepare(service, request)
        if request.stream:
            return await answer_stream(http, job.chunks())
        return await answer_whole(http, job.whole())

    return router


async def _prepare(service: Service, request: CompletionRequest) -> "_Job":
    ready = service.ready
    service.check_queue()
    text = await service.text()
    model = service.check_model(request.model)
    lane = service.lane(request.kv)
    params = completion_params(request, ready)
    adds, prompts = [], _prompts(request)
    if len(prompts) * params.n > MOST_COMPLETIONS:
        raise APIError(400, f"{len(prompts)} prompts with n={params.n} are too many; ask for less at once", param="n")
    if request.context and request.context_tokens:
        raise APIError(400, "context and context_tokens exclude each other; give one of them", param="context")
    context = await text.encode(request.context) if request.context else []
    for prompt in prompts:
        ids = await text.encode(prompt, special=not context) if isinstance(prompt, str) else prompt
        ids = context + ids
        if not ids:
            raise APIError(400, "the prompt is empty; give at least one token", param="prompt")
        service.check_length(len(ids), request.max_tokens, lane, "prompt")
        mark = request.context_tokens or len(context) or None
        adds.append(Add(new_id("req"), ids, params, lane, context=mark))
    service.log_prompts(request.prompt)
    return _Job(service, text, model, request, adds)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt: Any = request.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if single else list(prompt)


class _Job:
    """One completion request on its way."""

    def __init__(self, service: Service, text: Text, model: str, request: CompletionRequest, adds: list[Add]) -> None:
        self._service = service
        self._text = text
        self._request = request
        self._adds = adds
        self._n = adds[0].params.n
        self._usage = Usage(service.methods[adds[0].lane], sum(len(add.prompt_token_ids) for add in adds))
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        choices = [Choice(index) for index in range(len(self._adds) * self._n)]
        prompt_logprobs: dict[int, Any] = {}
        async with aclosing(self._updates()) as updates:
            async for index, update in updates:
                prompt_logprobs.setdefault(index, update.prompt_logprobs)
                if update.prompt_logprobs is not None:
                    prompt_logprobs[index] = update.prompt_logprobs
                for piece in update.pieces:
                    choices[index * self._n + piece.index].add(piece)
        shown = [self._choice(choice, prompt_logprobs[choice.index // self._n]) for choice in choices]
        return {**self._head, "choices": shown, "usage": self._usage.as_json()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        no_usage = {"usage": None} if with_usage else {}
        offsets: dict[int, int] = {}
        # Prompts come with the first update: before it the request may still be refused with a status of its own.
        echoes = list(enumerate(self._adds)) if self._request.echo else []
        async with aclosing(self._updates()) as updates:
            async for index, update in updates:
                while echoes:
                    first, add = echoes.pop(0)
                    prompt = self._prompt_text(add)
                    for i in range(first * self._n, (first + 1) * self._n):
                        offsets[i] = len(prompt)
                        yield {**self._head, "choices": [_bare(i, prompt, None)], **no_usage}
                for piece in update.pieces:
                    place = index * self._n + piece.index
                    shown = _bare(place, piece.text, piece.finish_reason)
                    if piece.logprobs is not None:
                        offset = offsets.get(place, 0)
                        shown["logprobs"] = completion_logprobs(self._text, piece.token_ids, piece.logprobs, offset)
                        offsets[place] = offset + sum(map(len, shown["logprobs"]["tokens"]))
                    yield {**self._head, "choices": [shown], **no_usage}
        if with_usage:
            yield {**self._head, "choices": [], "usage": self._usage.as_json()}

    async def _updates(self) -> AsyncGenerator[tuple[int, Update], None]:
        async with aclosing(self._service.run(self._adds)) as updates:
            async for index, update in updates:
                self._usage.add(update)
                yield index, update

    def _choice(self, choice: Choice, prompt_logprobs: Any) -> dict[str, Any]:
        add = self._adds[choice.index // self._n]
        prompt = self._prompt_text(add) if self._request.echo else ""
        shown = _bare(choice.index, prompt + choice.text, choice.finish_reason)
        if self._request.logprobs is not None:
            ids, entries = choice.token_ids, list(choice.logprobs)
            if self._request.echo:
                ids, entries = add.prompt_token_ids + ids, [*(prompt_logprobs or [None]), *entries]
            shown["logprobs"] = completion_logprobs(self._text, ids, entries)
        return shown

    def _prompt_text(self, add: Add) -> str:
        text: str = self._text.tokenizer.decode(add.prompt_token_ids, skip_special_tokens=True)
        return text


def _bare(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
