"""Line retrieval (LongEval, LongChat's): one number out of a long record of named lines."""

import re
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from kvfold.evaluation.tasks.base import EncodedSample, Sample, fill, fitted, generator
from kvfold.evaluation.tasks.data import LINES, damaged, read_objects
from kvfold.evaluation.tasks.encoder import Encoder

_LINE = re.compile(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)


@dataclass(frozen=True)
class _Record:
    """The text before the lines, the lines by name, and the name that is asked for."""

    head: str
    lines: dict[str, str]
    asked: str


@dataclass(frozen=True)
class Lines:
    """A record is cut to as many of its lines as fit, the one asked for among them; where it has too few, lines
    of other records follow. The answer begins as the lines do, so that the number itself is what is predicted."""

    name: ClassVar[str] = "lines"
    generate: ClassVar[int] = 0

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """See `Task.samples`."""
        records = [_parse(entry) for entry in read_objects(LINES)]
        encoder = Encoder(tokenizer)
        return [
            self._sample(records, encoder, length, generator(self.name, length, index, seed)) for index in range(count)
        ]

    def _sample(self, records: list[_Record], encoder: Encoder, length: int, rng: Random) -> EncodedSample:
        own, *more = rng.sample(records, len(records))
        lines = {name: content for record in more for name, content in record.lines.items()} | own.lines
        others = [name for name in lines if name != own.asked]
        # Those of its own record first, in any order: which lines stay says nothing of where they stood.
        others.sort(key=lambda name: (name not in own.lines, rng.random()))
        place = rng.random()

        def build(budget: int) -> Sample:
            kept = fill((_written(name, lines[name]) for name in others), budget, encoder.count)
            kept.insert(round(place * len(kept)), _written(own.asked, lines[own.asked]))
            question = (
                f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {own.asked}? "
                "I need the number."
            )
            lead = f"line {own.asked}: REGISTER_CONTENT is <"
            return Sample(own.head + "".join(kept).rstrip("\n"), question, lead, (lines[own.asked],), {"depth": place})

        return fitted(build, encoder, length)


def _written(name: str, content: str) -> str:
    return f"line {name}: REGISTER_CONTENT is <{content}>\n"


def _parse(entry: dict[str, Any]) -> _Record:
    try:
        prompt, asked = str(entry["prompt"]), str(entry["random_idx"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise damaged(LINES) from error
    lines = dict(_LINE.findall(prompt))
    first = _LINE.search(prompt)
    if first is None or lines.get(asked) != str(entry.get("expected_number")):
        raise damaged(LINES)
    return _Record(prompt[: first.start()], lines, asked)
