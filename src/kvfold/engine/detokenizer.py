"""Token ids to text, one token at a time, with stop strings that may straddle tokens."""

from collections.abc import Sequence
from typing import Protocol

from kvfold.engine.params import SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put for the bytes of a character that is not complete yet."""


class TokenDecoder(Protocol):
    """The one method needed: transformers' tokenizers (fast or slow) and `tokenizers.Tokenizer` have it."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = ...) -> str:
        """Text of `ids`."""
        ...


class Detokenizer:
    """Incremental decoding of one completion.

    Decoders are not additive (a character may span tokens; some strip the first space), so each new token is
    decoded together with the few tokens before it and only what that adds is new text. The pieces returned by
    `push` and `finish` join to the tokenizer's decoding of all tokens, cut at the first stop string.

    That join holds for every decoder in which later tokens leave complete characters alone. Byte fallback
    does not when invalid bytes follow a character in the same run: it then takes back the character, which
    was shown already; the text goes on with the replacement characters for the bytes that follow.
    (`tokenizers.decoders.DecodeStream` raises there, which is why it is not used.)
    """

    def __init__(self, tokenizer: TokenDecoder, params: SamplingParams | None = None) -> None:
        """Start with no tokens; `params` gives stop strings, `min_tokens` and `skip_special_tokens`."""
        params = params or SamplingParams()
        # The Rust tokenizer behind transformers' fast ones does the same in a fraction of the time.
        self._decoder: TokenDecoder = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        self._skip_special = params.skip_special_tokens
        self._stops = StopStrings(params.stop_strings, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._window: list[int] = []  # context, already in the text, then tokens that are not settled yet
        self._context = 0  # length of the context, in tokens
        self._done = 0  # characters of the window's text that were handed on
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that `push` and `finish` have returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Add a token and return the new text that is safe to show; "" once a stop string was found."""
        if self.stopped_by is not None:
            return ""
        self._num_tokens += 1
        self._window.append(token_id)
        window_text = self._decode(self._window)
        settled = window_text.rstrip(_REPLACEMENT)
        new, self._done = settled[self._done :], max(self._done, len(settled))
        if settled == window_text:
            self._advance()
        return self._emit(self._stops.push(new, honoured=self._num_tokens >= self._min_tokens))

    def finish(self) -> str:
        """End of the tokens: return what was held back (part of a character, the start of a stop string)."""
        if self.stopped_by is not None:
            return ""
        rest = self._decode(self._window)[self._done :]
        self._window, self._context, self._done = [], 0, 0
        new = self._stops.push(rest, honoured=self._num_tokens >= self._min_tokens)
        return self._emit(new + self._stops.flush())

    def _advance(self) -> None:
        """Make the tokens just settled the next context, if they have text of their own.

        A context without text (special tokens, a lone stripped space) would make the next token look like
        the first one to the decoder.
        """
        fresh = self._window[self._context :]
        length = len(self._decode(fresh))
        if length:
            self._window, self._context, self._done = fresh, len(fresh), length

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=self._skip_special)

    def _emit(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


class StopStrings:
    """Cuts a stream of text at the stop string that is complete first (of those, the one starting first).

    The cut does not depend on how the text was divided into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`stops`: non-empty strings; `include`: keep the stop string at the end of the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""  # the longest end of the text that could be the beginning of a stop string
        self.found: str | None = None

    def push(self, piece: str, *, honoured: bool = True) -> str:
        """Add `piece` and return what is safe to show.

        With `honoured` False, stop strings that end within `piece` do not count.
        """
        if not self._stops or not piece or self.found is not None:
            return "" if self.found is not None else piece
        text, known = self._held + piece, len(self._held)
        if honoured:
            match = self._first(text, known)
            if match is not None:
                start, self.found = match
                self._held = ""
                return text[: start + len(self.found)] if self._include else text[:start]
        keep = self._holdback(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """End of the text: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """Start and stop string of the match that ends first, among those that end after `known`."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _holdback(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
