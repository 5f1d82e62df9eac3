"""Which prompts begin with the same tokens, as far as a trace's block ids say."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.benchmark.trace import TraceRequest

Key = tuple[int, int]
"""Of the first tokens of a prompt: how many, and what names them."""


@dataclass(frozen=True, slots=True)
class PromptName:
    """names: of the prompt's first block, its first two, and so on; equal ones mean equal tokens. block: tokens of a
    block."""

    block: int
    names: tuple[int, ...]

    def prefix(self, length: int) -> Key:
        """Of the first `length` tokens, 1 to all of the prompt. A part of a block is as equal as the whole is."""
        return length, self.names[-(-length // self.block) - 1]


def name_prompts(requests: Sequence[TraceRequest]) -> list[PromptName]:
    """Names of every prompt; one of which the trace says nothing shares nothing."""
    known: dict[Key, int] = {}
    found = []
    for index, request in enumerate(requests):
        blocks = -(-request.input_tokens // request.block_tokens)
        ids = (*request.hash_ids[:blocks], *[-1 - index] * (blocks - len(request.hash_ids)))
        name, names = -1, []
        for each in ids:
            name = known.setdefault((name, each), len(known))
            names.append(name)
        found.append(PromptName(request.block_tokens, tuple(names)))
    return found
