"""What /openapi.json says that the routes cannot: the shapes of answers, and no status that is never sent."""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from kvfold.server.http_errors import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}


# Of a route whose own answers are no JSON.
JSON_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}}
    for status in ERRORS
}


def answers(model: type[BaseModel], *, events: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that answers with `model`, which is documented and not enforced. events: with
    stream=true it answers with server-sent events."""
    success: dict[str, Any] = {"model": model, "description": "Success"}
    if events:
        success["content"] = {"text/event-stream": {"schema": _EVENT}}
    return {200: success, **ERRORS}


_EVENT = {
    "type": "object",
    "description": "An event; its data is a chunk, one JSON object, or after the last chunk `[DONE]`.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


class DocumentedApp(FastAPI):
    """An application that answers invalid requests with 400, so that FastAPI's 422 does not belong in its document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            document = super().openapi()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema


class KVUsage(BaseModel):
    """KV memory of an answer's sequences at their end; compression: dense_bytes / bytes."""

    method: str
    bytes: int
    dense_bytes: int
    compression: float


class PromptDetails(BaseModel):
    """cached_tokens: prompt tokens that were found among prefix snapshots."""

    cached_tokens: int


class UsageAnswer(BaseModel):
    """Tokens and KV bytes of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    kv: KVUsage


class TokenLogprob(BaseModel):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, and the most likely ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token of the answer."""

    content: list[ChatTokenLogprob] | None
    refusal: None


class CalledFunction(BaseModel):
    """arguments: JSON text."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """An answered conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionLogprobs(BaseModel):
    """One entry per token in each list; the first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n continuations."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Continued texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ModelCard(BaseModel):
    """max_model_len: tokens of its longest sequence, null while it is being loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    kv_methods: list[str]


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The answer of /v1/tokenize."""

    count: int
    tokens: list[int]
    max_model_len: int
