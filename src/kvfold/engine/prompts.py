"""From what a caller may pass as prompts and messages to token ids, or one clear sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from kvfold.errors import PromptError

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Messages = Sequence[Message]

_PROMPT = 'give a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
_CONTEXT = 'give {"context": text, "prompt": text} or {"prompt_token_ids": ids, "context_tokens": number}'
_MESSAGES = 'give a list of {"role": ..., "content": ...}'


@dataclass(frozen=True)
class Tokens:
    """A prompt as the engine takes it. text: what it was made from, if a text; context: how many of its first tokens
    are the context that a method with compress="context" compresses before it reads the others, if it says so."""

    ids: list[int]
    text: str | None = None
    context: int | None = None


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


def tokenize(tokenizer: Any, prompt: Prompt) -> Tokens:
    """Token ids of a prompt. Raises PromptError for anything but a prompt."""
    text: Any = prompt if isinstance(prompt, str) else None
    ids: Any = None if isinstance(prompt, str) else prompt
    mark: Any = None
    if isinstance(prompt, Mapping):
        text, ids, mark = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("context_tokens")
        if "context" in prompt:
            return _with_context(tokenizer, prompt)
    if isinstance(text, str) and ids is None and mark is None:
        return Tokens(encode(tokenizer, text), text)
    tokens = None if isinstance(ids, str | bytes | Mapping) else _items(ids)
    if tokens is None or not all(map(_is_id, tokens)):
        raise PromptError(f"{_shown(prompt)} is no prompt; {_PROMPT}")
    if mark is not None and (not _is_id(mark) or not 0 < mark <= len(tokens)):
        raise PromptError(f"context_tokens={mark!r} is out of range; give 1 to the prompt's {len(tokens)} tokens")
    return Tokens([int(token) for token in tokens], text if isinstance(text, str) else None, mark)


def _with_context(tokenizer: Any, prompt: Mapping[str, Any]) -> Tokens:
    context, question = prompt["context"], prompt.get("prompt")
    if not isinstance(context, str) or not isinstance(question, str) or prompt.get("prompt_token_ids") is not None:
        raise PromptError(f"{_shown(prompt)} is no prompt with a context; {_CONTEXT}")
    before = encode(tokenizer, context)
    if not before:
        raise PromptError("the context is empty; leave it out or give at least one token")
    return Tokens(before + encode(tokenizer, question, add_special_tokens=False), context + question, len(before))


def last_message(tokenizer: Any, messages: Messages, ids: Sequence[int], **variables: Any) -> int:
    """How many of a rendered conversation's tokens `ids` come before the text of its last message.

    Raises PromptError where there is nothing to read before it.
    """
    other = [*messages[:-1], {**messages[-1], "content": "\N{INVISIBLE SEPARATOR}"}]
    others = encode(tokenizer, render_chat(tokenizer, other, **variables), add_special_tokens=False)
    same = (index for index, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1])
    before = next(same, min(len(ids), len(others)))
    if len(messages) < 2 or not before:
        raise PromptError(
            "the method compresses what comes before the last message, and there is none; give the document in a "
            'message of its own, or use compress="prompt"'
        )
    return before


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


def check_ids(ids: Sequence[int], vocab: int, positions: int) -> None:
    """Raises PromptError for a prompt that a model with so many tokens and positions cannot go on from."""
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    outside = [token for token in ids if not 0 <= token < vocab]
    if outside:
        raise PromptError(f"token id {outside[0]} is not in the vocabulary; give ids below {vocab}")
    if len(ids) >= positions:
        raise PromptError(f"the prompt has {len(ids)} tokens, the model takes {positions - 1}; shorten the prompt")


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
