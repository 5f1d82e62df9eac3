"""Question answering (XQuAD): the paragraph that holds the answer among paragraphs that do not."""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from kvfold.evaluation.tasks.base import EncodedSample, Sample, fill, fitted, generator
from kvfold.evaluation.tasks.data import XQUAD, damaged, read_object
from kvfold.evaluation.tasks.encoder import Encoder

_TASK = "Read the following paragraphs. I will ask a question about one of them afterwards.\n\n"


@dataclass(frozen=True)
class _Item:
    """A question, its answers, its article and its paragraph."""

    question: str
    answers: tuple[str, ...]
    article: int
    paragraph: str


@dataclass(frozen=True)
class QA:
    """Distractors come from other articles, so that none of them answers the question; tags hold the depth."""

    name: ClassVar[str] = "qa"
    generate: ClassVar[int] = 24

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """See `Task.samples`."""
        items = _read()
        encoder = Encoder(tokenizer)
        return [
            self._sample(items, encoder, length, generator(self.name, length, index, seed)) for index in range(count)
        ]

    def _sample(self, items: list[_Item], encoder: Encoder, length: int, rng: Random) -> EncodedSample:
        # A paragraph that leaves no room for others is no sample of this length.
        fitting = [item for item in items if encoder.count(item.paragraph) < length // 2]
        item = rng.choice(fitting or items)
        others = list(dict.fromkeys(i.paragraph for i in items if i.article != item.article))
        rng.shuffle(others)
        place = rng.random()

        def build(budget: int) -> Sample:
            kept = fill(others, budget - encoder.count(item.paragraph), encoder.count)
            kept.insert(round(place * len(kept)), item.paragraph)
            question = f"{item.question} Answer with as few words of the text as possible."
            answers = tuple(f" {answer}" for answer in item.answers)
            return Sample(_TASK + "\n\n".join(kept), question, "Answer:", answers, {"depth": place})

        return fitted(build, encoder, length)


def _read() -> list[_Item]:
    try:
        return [
            _Item(qa["question"], tuple(a["text"] for a in qa["answers"]), article, paragraph["context"])
            for article, entry in enumerate(read_object(XQUAD)["data"])
            for paragraph in entry["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise damaged(XQUAD) from error
