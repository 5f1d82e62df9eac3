"""Needle in a haystack: one sentence with a number, at a depth of a long text about other things."""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.tasks.base import EncodedSample, Sample, fill, fitted, generator, rotated
from kvfold.evaluation.tasks.data import read_wikitext
from kvfold.evaluation.tasks.encoder import Encoder
from kvfold.evaluation.tasks.words import names, number

DEPTHS = (0.5, 0.0, 1.0, 0.25, 0.75)
"""Of the needle, as a fraction of the haystack; samples take them in turn."""

_TASK = "A special magic number is hidden within the following text. Remember it. I will ask for it afterwards.\n\n"


@dataclass(frozen=True)
class Needle:
    """The haystack is WikiText-2 in sentences, from a random one on."""

    name: ClassVar[str] = "needle"
    generate: ClassVar[int] = 0

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """See `Task.samples`; tags hold the depth."""
        encoder = Encoder(tokenizer)
        sentences = _sentences(read_wikitext())
        return [
            self._sample(
                sentences, DEPTHS[index % len(DEPTHS)], encoder, length, generator(self.name, length, index, seed)
            )
            for index in range(count)
        ]

    def _sample(self, sentences: list[str], depth: float, encoder: Encoder, length: int, rng: Random) -> EncodedSample:
        hay = rotated(sentences, rng.randrange(len(sentences)))
        (name,), hidden = names(rng, 1), number(rng)

        def build(budget: int) -> Sample:
            kept = fill(hay, budget, encoder.count)
            if len(kept) == len(hay):
                raise EvaluationError(f"the text is shorter than {length} tokens; give a shorter --context")
            kept.insert(round(depth * len(kept)), f"The special magic number for {name} is {hidden} .")
            lead = f"The special magic number for {name} is"
            question = f"What is the special magic number for {name} mentioned in the text?"
            return Sample(_TASK + " ".join(kept), question, lead, (f" {hidden}",), {"depth": depth})

        return fitted(build, encoder, length)


def _sentences(text: str) -> list[str]:
    """Sentences of WikiText, which ends them with ` . `; headings are left out."""
    lines = (line.strip() for line in text.splitlines())
    found = [
        f"{sentence} ."
        for line in lines
        if line and not line.startswith("=")
        for sentence in line.removesuffix(" .").split(" . ")
    ]
    if not found:
        raise EvaluationError("the text has no sentences to hide a needle in; give another wiki.test.raw")
    return found
