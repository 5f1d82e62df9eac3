"""What a task is made of: samples as text, the same as token ids, and how they are cut to a length."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from kvfold.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Sample:
    """A context, a question about it, how the answer begins (`lead`), and right answers, the first being the one
    whose likelihood is measured. The answer follows the lead, its first space included."""

    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    tags: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids: the prompt is context + question, the right answer follows it.

    context: what may be compressed before the question is read. tags: where it stands on the axes of a picture.
    """

    context: list[int]
    question: list[int]
    answer: list[int]
    answers: tuple[str, ...] = ()
    tags: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> list[int]:
        return self.context + self.question


class Task(Protocol):
    """`generate`: tokens to generate where the answer is judged as text; 0 where likelihood tells all."""

    name: ClassVar[str]
    generate: ClassVar[int]

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[EncodedSample]:
        """`count` samples whose contexts have at most `length` tokens and nearly as many; sample i of a seed and
        length is the same whatever `count` is. Raises EvaluationError where the data is missing or too short.
        """
        ...


def generator(task: str, length: int, index: int, seed: int) -> random.Random:
    """Random numbers of one sample, the same on every machine."""
    return random.Random(f"{task}/{seed}/{length}/{index}")


def fitted(build: Callable[[int], Sample], encode: Callable[[Sample], EncodedSample], length: int) -> EncodedSample:
    """The sample that `build` makes from a budget of tokens, with the largest budget found whose context has at
    most `length` tokens: what template and instructions take is only known from the whole."""
    budget, step = length, 1
    while budget > 0:
        encoded = encode(build(budget))
        excess = len(encoded.context) - length
        if excess <= 0:
            return encoded
        # An excess smaller than a piece would else be taken off again and again with no piece dropped.
        budget -= max(excess, step)
        step *= 2
    raise EvaluationError(f"a context of {length} tokens is too short for this task; give a longer --context")


def fill(pieces: Iterable[str], budget: int, count: Callable[[str], int]) -> list[str]:
    """As many leading pieces as have at most `budget` tokens together, counted one by one."""
    taken = []
    for piece in pieces:
        budget -= count(piece)
        if budget < 0:
            break
        taken.append(piece)
    return taken


def rotated(items: Sequence[str], start: int) -> list[str]:
    """All items once, from `start` on and around."""
    return [*items[start:], *items[:start]]
