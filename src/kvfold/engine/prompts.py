"""From what a caller may pass as prompts and messages to token ids, or one clear sentence."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from kvfold.errors import PromptError

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Messages = Sequence[Message]

_PROMPT = 'give a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
_MESSAGES = 'give a list of {"role": ..., "content": ...}'


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; a flat list of token ids is one prompt.

    Raises PromptError where there is none.
    """
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    several = _items(prompts)
    if several is None:
        raise PromptError(f"{type(prompts).__name__} is no prompt; {_PROMPT}")
    if not several:
        raise PromptError("there is no prompt; give at least one")
    return [several] if _is_id(several[0]) else several


def tokenize(tokenizer: Any, prompt: Prompt) -> tuple[str | None, list[int]]:
    """The text of a prompt, if it has one, and its token ids. Raises PromptError for anything but a prompt."""
    text: Any = prompt if isinstance(prompt, str) else None
    ids: Any = None if isinstance(prompt, str) else prompt
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if isinstance(text, str) and ids is None:
        return text, encode(tokenizer, text)
    tokens = None if isinstance(ids, str | bytes | Mapping) else _items(ids)
    if tokens is None or not all(map(_is_id, tokens)):
        raise PromptError(f"{_shown(prompt)} is no prompt; {_PROMPT}")
    return text if isinstance(text, str) else None, [int(token) for token in tokens]


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The token ids of `text`. Raises PromptError for text that no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as undecodable bytes of a command line become
        raise PromptError("the prompt is not valid Unicode; give text in UTF-8") from error
    ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return ids


def render_chat(tokenizer: Any, messages: Messages, **variables: Any) -> str:
    """A conversation as the model's chat template writes it, ending where the answer begins.

    variables: what else the template may use, such as `tools`. Raises PromptError where there is no template or
    it refuses.
    """
    if tokenizer.chat_template is None:
        raise PromptError("the model has no chat template; use a plain prompt")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    except Exception as error:  # templates are programs of the model's and raise anything
        raise PromptError(f"the chat template refuses the messages ({error}); check roles and contents") from error
    return text


def list_conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation or several, as a list. Raises PromptError for anything but lists of messages with a role."""
    given: Any = messages
    if not given:
        raise PromptError("the conversation is empty; give at least one message")
    listed = isinstance(given, list | tuple)
    conversations = [given] if listed and isinstance(given[0], Mapping) else given
    if not listed or not all(map(_is_conversation, conversations)):
        raise PromptError(f"{_shown(given)} is no conversation; {_MESSAGES}")
    return list(conversations)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _items(value: Any) -> list[Any] | None:
    """The items of a sequence, tensor or array; None where it is nothing of the kind."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, Iterable) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
