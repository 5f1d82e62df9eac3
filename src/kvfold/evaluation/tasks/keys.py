"""Multi-key retrieval in the manner of RULER (2404.06654): a context of nothing but keys and values, one asked for.

Nothing tells the wanted pair from the others before the question is known: what a method drops blindly is lost.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.tasks.base import EncodedSample, Sample, fill, fitted, generator
from kvfold.evaluation.tasks.encoder import Encoder
from kvfold.evaluation.tasks.words import names, number

MOST = 1600
_TASK = "Many special magic numbers are listed below. Remember them all. I will ask for one of them afterwards.\n\n"


@dataclass(frozen=True)
class Keys:
    """Pairs of a name and seven digits; tags hold the depth of the one that is asked for."""

    name: ClassVar[str] = "keys"
    generate: ClassVar[int] = 0

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """See `Task.samples`."""
        encoder = Encoder(tokenizer)
        return [self._sample(encoder, length, generator(self.name, length, index, seed)) for index in range(count)]

    def _sample(self, encoder: Encoder, length: int, rng: Random) -> EncodedSample:
        pairs = [(name, number(rng)) for name in names(rng, MOST)]
        place = rng.random()

        def build(budget: int) -> Sample:
            kept = fill((_written(*pair) for pair in pairs), budget, encoder.count)
            if not kept or len(kept) == MOST:
                problem, remedy = ("long", "shorter") if kept else ("short", "longer")
                raise EvaluationError(f"{length} tokens are too {problem} for keys; give a {remedy} --context")
            at = int(place * len(kept))
            name, value = pairs[at]
            question = f"What is the special magic number for {name} mentioned in the list?"
            lead = f"The special magic number for {name} is"
            context = _TASK + "".join(kept).rstrip("\n")
            return Sample(context, question, lead, (f" {value}",), {"depth": at / len(kept)})

        return fitted(build, encoder, length)


def _written(name: str, value: str) -> str:
    return f"The special magic number for {name} is {value}.\n"
