"""The tokenizer as the API process uses it: in threads, so that a long prompt holds nobody else up."""

import asyncio
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.engine.prompts import encode
from kvfold.errors import GrammarError
from kvfold.model.loading import load_tokenizer
from kvfold.server.http_errors import APIError
from kvfold.server.messages import Ready

if TYPE_CHECKING:  # xgrammar is read with the first grammar
    from kvfold.engine.grammar import GrammarCompiler

COMPILE_SECONDS = 20.0
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a blank


class Text:
    """Texts to token ids, and token ids to the texts of single tokens."""

    def __init__(self, ready: Ready) -> None:
        self.tokenizer: Any = load_tokenizer(Path(ready.path))
        self._byte_level = "ByteLevel" in repr(getattr(self.tokenizer.backend_tokenizer, "decoder", None))
        self.token = lru_cache(maxsize=1 << 16)(self._token)
        self._ready = ready
        self._most_characters = ready.max_positions * max(map(len, self.tokenizer.get_vocab()))
        # Grammars are compiled one after the other, so that expensive ones cannot take every core.
        self._turn = asyncio.Lock()

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a prompt; special: with what the tokenizer puts around a plain text.

        Raises PromptError for text that no encoding can hold, APIError (400) for one that is too long in any case.
        """
        return await asyncio.to_thread(self.encode_now, text, special=special)

    def encode_now(self, text: str, *, special: bool) -> list[int]:
        """As `encode`, in the caller's thread."""
        if len(text) > self._most_characters:  # not worth the seconds that finding out exactly would take
            message = (
                f"the model takes {self._ready.max_positions} tokens, {len(text)} characters are more; shorten them"
            )
            raise APIError(400, message, code="context_length_exceeded")
        return encode(self.tokenizer, text, add_special_tokens=special)

    async def compile(self, work: "Callable[[GrammarCompiler], bytes]") -> bytes:
        """A grammar for the engine. Raises GrammarError where it is wrong or takes too long."""
        async with self._turn:
            try:
                async with asyncio.timeout(COMPILE_SECONDS):
                    return await asyncio.to_thread(lambda: work(self._compiler))
            except TimeoutError:
                raise GrammarError(
                    f"compiling the JSON schema takes longer than {COMPILE_SECONDS:g} s; simplify it"
                ) from None

    @cached_property
    def _compiler(self) -> "GrammarCompiler":
        from kvfold.engine.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self._ready.vocab, self._ready.eos_token_ids)

    def _token(self, token_id: int) -> tuple[str, list[int]]:
        """One token's text, special or not, and its bytes: a character may be spread over several tokens."""
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        known = _byte_of_character()
        if self._byte_level and name and all(c in known for c in name):
            return text, [known[c] for c in name]
        if name and re.fullmatch(r"<0x[0-9A-F]{2}>", name):  # a byte that the vocabulary has no better token for
            return text, [int(name[3:5], 16)]
        if name and name.startswith(BLANK) and not text.startswith(" "):  # decoders take the first blank away
            text = name.replace(BLANK, " ")
        return text, list(text.encode())


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for (GPT-2's table)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
