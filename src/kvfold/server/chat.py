"""POST /v1/chat/completions"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from kvfold.server.answer_reader import AnswerReader
from kvfold.server.answering import answer_stream, answer_whole
from kvfold.server.chat_prompt import ChatPrompt, prepare_chat
from kvfold.server.messages import Add, Update
from kvfold.server.openapi import ChatCompletion, answers
from kvfold.server.prepare import chat_params, new_id
from kvfold.server.protocol import ChatCompletionRequest
from kvfold.server.responses import Choice, Usage, chat_logprobs
from kvfold.server.service import Service
from kvfold.server.text import Text


def chat_router(service: Service) -> APIRouter:
    """Answers conversations."""
    router = APIRouter(dependencies=[Depends(service.track)])

    @router.post(
        "/v1/chat/completions", responses=answers(ChatCompletion, events=True), summary="Answer a conversation"
    )
    async def create(request: ChatCompletionRequest, http: Request) -> Response:
        job = await _prepare(service, request)
        if request.stream:
            return await answer_stream(http, job.chunks())
        return await answer_whole(http, job.whole())

    return router


async def _prepare(service: Service, request: ChatCompletionRequest) -> "_Job":
    ready = service.ready
    service.check_queue()
    text = await service.text()
    model = service.check_model(request.model)
    lane = service.lane(request.kv)
    params = chat_params(request, ready)
    prompt = await prepare_chat(text, request, ready.needs_context[lane])
    service.check_length(len(prompt.token_ids), request.max_completion_tokens or request.max_tokens, lane, "messages")
    service.log_prompts(request.messages)
    add = Add(new_id("req"), prompt.token_ids, params, lane, prompt.grammar, prompt.context)
    return _Job(service, text, model, request, prompt, add)


class _Job:
    """One chat completion on its way."""

    def __init__(
        self, service: Service, text: Text, model: str, request: ChatCompletionRequest, prompt: ChatPrompt, add: Add
    ) -> None:
        self._service = service
        self._text = text
        self._request = request
        self._prompt = prompt
        self._add = add
        self._top = request.top_logprobs or 0
        self._usage = Usage(service.methods[add.lane], len(add.prompt_token_ids))
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        choices = [Choice(index) for index in range(self._add.params.n)]
        async with aclosing(self._updates()) as updates:
            async for update in updates:
                for piece in update.pieces:
                    choices[piece.index].add(piece)
        shown = [self._choice(choice) for choice in choices]
        return {**self._head, "object": "chat.completion", "choices": shown, "usage": self._usage.as_json()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        no_usage = {"usage": None} if with_usage else {}
        readers: dict[int, AnswerReader] = {}
        async with aclosing(self._updates()) as updates:
            async for update in updates:
                for piece in update.pieces:
                    role: dict[str, Any] = {}
                    if piece.index not in readers:
                        readers[piece.index] = self._reader()
                        role = {"role": "assistant", "content": ""}
                    reader = readers[piece.index]
                    delta = role | reader.push(piece.text, last=piece.finish_reason is not None)
                    if not delta and piece.finish_reason is None and piece.logprobs is None:
                        continue  # text that is held back: half a character, the beginning of a call
                    shown = {
                        "index": piece.index,
                        "delta": delta,
                        "logprobs": chat_logprobs(self._text, piece.token_ids, piece.logprobs, self._top),
                        "finish_reason": reader.finish_reason(piece.finish_reason),
                    }
                    yield {**head, "choices": [shown], **no_usage}
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage.as_json()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entries = choice.logprobs if self._request.logprobs else None
        reader = self._reader()
        reader.push(choice.text, last=True)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "refusal": None, **reader.message()},
            "logprobs": chat_logprobs(self._text, choice.token_ids, entries, self._top),
            "finish_reason": reader.finish_reason(choice.finish_reason),
        }

    def _reader(self) -> AnswerReader:
        return AnswerReader(with_tools=self._prompt.tools is not None)

    async def _updates(self) -> AsyncGenerator[Update, None]:
        async with aclosing(self._service.run([self._add])) as updates:
            async for _, update in updates:
                self._usage.add(update)
                yield update
