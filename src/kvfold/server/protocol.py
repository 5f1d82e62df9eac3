"""What clients may send, as OpenAI's API names it, plus `kv` and the sampling options of vLLM."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_PROMPTS = 256
MOST_STOPS = 16
MOST_BIASES = 4096
MOST_MESSAGES = 10_000

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


def _token_keys(value: Any) -> Any:
    """JSON has no other keys than strings; token ids are numbers."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_BIASES:  # told before each of them is looked at
        raise ValueError(f"there are {len(value)} entries, at most {MOST_BIASES} are allowed")
    return {
        int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 11 else key: v for key, v in value.items()
    }


class Model(BaseModel):
    """Types are taken at their word ("1" is no number), NaN is no number, unknown fields are ignored as OpenAI does."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Model):
    """include_usage: one more chunk at the end of a stream, with the usage."""

    include_usage: bool = False


class SamplingFields(Model):
    """What chat and plain completions have in common. null is the same as leaving a field out."""

    model: str | None = Field(None, description="One of /v1/models; the server's only model where it is left out.")
    kv: str | None = Field(None, description="KV cache method, one of those the server was started with.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # less would overflow logits
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_token_keys)] | None
    ) = Field(None, json_schema_extra={"maxProperties": MOST_BIASES, "propertyNames": {"pattern": "^[0-9]{1,10}$"}})
    user: str | None = None


class TextPart(Model):
    """The only kind of content part a text model takes."""

    type: Literal["text"]
    text: str


class FunctionCall(Model):
    """A call the assistant made earlier; arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(Model):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


# fail_fast: without it one body of a million mistakes gets a million explanations, which takes half a minute.
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class FunctionDefinition(Model):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Model):
    """The body of `response_format` of type json_schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: None = Field(None, description="Not supported: use tools.")
    function_call: None = Field(None, description="Not supported: use tool_choice.")
    audio: None = Field(None, description="Not supported: the model writes text.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    web_search_options: None = Field(None, description="Not supported.")
    prediction: None = Field(None, description="Not supported.")


class CompletionRequest(SamplingFields):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    context: str | None = Field(
        None, description='Text before the prompt: what a method with compress="context" compresses before it reads on.'
    )
    context_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The same where the prompt is token ids: how many of the first ones are the context."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(None, description="Only as many as n.")
    suffix: None = Field(None, description="Not supported: the model does not fill in the middle.")


class TokenizeRequest(Model):
    """POST /v1/tokenize: of a text, or of messages as the chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
