"""How the tokens of one request are chosen and when it stops: vLLM's names and defaults, validated early."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from kvfold.errors import ConfigError

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature sampling is greedy: dividing float32 logits by less would only overflow."""

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping options of one request; every field is checked on construction.

    Penalties, temperature and filters act in the order given in `kvfold.engine.sampler`.

    Attributes:
        n: completions per prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: smallest set of most likely tokens whose probability reaches `top_p`; 1 is off.
        top_k: the `top_k` most likely tokens; 0 or -1 is off (both are stored as 0).
        min_p: tokens at least `min_p` times as likely as the most likely one; 0 is off.
        presence_penalty: subtracted once from the logit of every token already generated.
        frequency_penalty: subtracted once per occurrence among the generated tokens.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        seed: makes the request reproducible whatever it is batched with; None lets the engine choose.
        stop: string or strings that end the text (stored as a tuple).
        stop_token_ids: token ids that end the completion, besides the model's own end of sequence.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: go on after the model's end-of-sequence token.
        max_tokens: most tokens to generate; None means up to the model's limit.
        min_tokens: tokens to generate before end of sequence, stop ids or stop strings may end it.
        logprobs: number of most likely tokens to report per generated token; None reports nothing.
        prompt_logprobs: the same for each prompt token.
        logit_bias: token id to a number in [-100, 100] added to its logit.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._integer("n", low=1)
        self._real("temperature", low=0.0)
        self._real("top_p", low=0.0, high=1.0, open_low=True)
        self._integer("top_k", low=-1, high=_INT64_MAX)
        self._set("top_k", max(self.top_k, 0))
        self._real("min_p", low=0.0, high=1.0)
        self._real("presence_penalty", low=-2.0, high=2.0)
        self._real("frequency_penalty", low=-2.0, high=2.0)
        self._real("repetition_penalty", low=0.0, open_low=True)
        self._integer("seed", low=_INT64_MIN, high=_INT64_MAX, optional=True)
        self._integer("max_tokens", low=1, optional=True)
        self._integer("min_tokens", low=0)
        self._integer("logprobs", low=0, optional=True)
        self._integer("prompt_logprobs", low=0, optional=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")
        self._set("stop", _strings("stop", self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _error("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none empty; () when there are none."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> frozenset[int]:
        """The request's own stop token ids (the model's end of sequence is not among them)."""
        return frozenset(self.stop_token_ids or ())

    def last_position(self, prompt: int, positions: int) -> int:
        """Tokens, prompt and output, at which a completion ends in a model that takes so many positions."""
        return positions if self.max_tokens is None else min(prompt + self.max_tokens, positions)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check every token id in the parameters against the model.

        Raises:
            ConfigError: an id in `stop_token_ids` or `logit_bias` is `vocab_size` or more.
        """
        named_ids: tuple[tuple[str, Iterable[int]], ...] = (
            ("stop_token_ids", self.stop_token_ids or ()),
            ("logit_bias", self.logit_bias or {}),
        )
        for name, ids in named_ids:
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _error(name, token_id, f"token ids below the vocabulary size ({vocab_size})")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the only writes are those of __post_init__

    def _integer(self, name: str, *, low: int, high: int | None = None, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        upper = f"between {low} and {high}" if high is not None else f"of at least {low}"
        if not _is_integer(value) or value < low or (high is not None and value > high):
            raise _error(name, value, f"an integer {upper}" + (" or None" if optional else ""))
        self._set(name, int(value))

    def _real(self, name: str, *, low: float, high: float | None = None, open_low: bool = False) -> None:
        value = getattr(self, name)
        allowed = f"a number {'greater than' if open_low else 'of at least'} {low:g}"
        allowed += f" and at most {high:g}" if high is not None else ""
        if not _is_finite(value) or value < low or (open_low and value == low):
            raise _error(name, value, allowed)
        if high is not None and value > high:
            raise _error(name, value, allowed)
        self._set(name, float(value))


def _error(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} is not allowed: give {allowed}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _strings(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise _error(name, value, "a non-empty string, a list of non-empty strings or None")
    return tuple(dict.fromkeys(items))


def _token_ids(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = value if isinstance(value, list | tuple | set | frozenset) else (None,)
    if not all(_is_integer(item) and item >= 0 for item in items):
        raise _error(name, value, "a list of token ids (integers of at least 0) or None")
    return tuple(sorted({int(item) for item in items}))


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    allowed = "a mapping of token ids (integers of at least 0) to numbers between -100 and 100, or None"
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, allowed)
    for token_id, bias in value.items():
        if not (_is_integer(token_id) and token_id >= 0 and _is_finite(bias) and -100 <= bias <= 100):
            raise _error("logit_bias", {token_id: bias}, allowed)
    return {int(token_id): float(bias) for token_id, bias in value.items()}
