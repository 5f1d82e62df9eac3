"""Plain text: how well its continuation is predicted through a compressed context.

The sharpest measure on a small model: every token of the continuation tells something, and the divergence from the
dense cache needs no right answer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvfold.engine.prompts import encode
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.tasks.base import EncodedSample, generator
from kvfold.evaluation.tasks.data import read_wikitext
from kvfold.evaluation.tasks.encoder import beginning


@dataclass(frozen=True)
class Text:
    """Windows of WikiText-2, none overlapping another. continuation: tokens to predict after the context and one
    more, which is the question: it is predicted before anything is compressed, so that it tells nothing."""

    continuation: int = 256

    name: ClassVar[str] = "text"
    generate: ClassVar[int] = 0

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """See `Task.samples`; contexts have exactly `length` tokens."""
        before = beginning(tokenizer)
        ids = encode(tokenizer, read_wikitext(), add_special_tokens=False)
        read = length - len(before)
        window = read + 1 + self.continuation
        places = list(range(len(ids) // window))
        if count > len(places):
            raise EvaluationError(
                f"the text has {len(places)} windows of {window} tokens, not {count}; lower --samples or --context"
            )
        generator(self.name, length, 0, seed).shuffle(places)
        windows = [ids[place * window : (place + 1) * window] for place in places[:count]]
        return [EncodedSample(before + w[:read], [w[read]], w[read + 1 :]) for w in windows]
