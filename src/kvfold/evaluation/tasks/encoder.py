"""From a sample's text to token ids, with the context's ids a true prefix of the prompt's."""

from functools import lru_cache
from typing import Any

from kvfold.engine.prompts import encode, render_chat
from kvfold.errors import ModelError, PromptError
from kvfold.evaluation.tasks.base import EncodedSample, Sample


class Encoder:
    """Puts context and question into one user turn of the model's chat template; base models get plain text.

    Raises ModelError for a tokenizer that does not tell where in the text its tokens stand.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the model's tokenizer tells no offsets; put its tokenizer.json next to the weights")
        self._tokenizer = tokenizer
        self.count = lru_cache(maxsize=100_000)(self._count)

    def __call__(self, sample: Sample) -> EncodedSample:
        """The whole is tokenised once, as a model is used to seeing it, and cut at token ends: a token that reaches
        from the context into the question belongs to the question."""
        text = self._render(f"{sample.context}\n\n{sample.question}")
        begin = text.find(sample.context)
        if begin < 0:
            raise PromptError("the chat template rewrites what users say; this task needs it word for word")
        start = begin + len(sample.context)
        prompt = text + sample.lead
        found = self._tokenizer(
            prompt + sample.answers[0], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
        first, last = _beyond(ends, start), _beyond(ends, len(prompt))
        before = [] if self._tokenizer.chat_template else beginning(self._tokenizer)
        return EncodedSample(before + ids[:first], ids[first:last], ids[last:], sample.answers, sample.tags)

    def _render(self, content: str) -> str:
        if self._tokenizer.chat_template is None:
            return content + "\n"
        return render_chat(self._tokenizer, [{"role": "user", "content": content}])

    def _count(self, text: str) -> int:
        return len(encode(self._tokenizer, text, add_special_tokens=False))


def beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    ids = encode(tokenizer, "x")
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _beyond(ends: list[int], cut: int) -> int:
    """How many leading tokens end at `cut` or before."""
    return next((i for i, end in enumerate(ends) if end > cut), len(ends))
