"""Which prompts a worker has read and may still hold: what whoever routes requests knows of its prefix cache."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

MOST = 4096  # blocks that are remembered; the longest unused one is forgotten

Block = TypeVar("Block", bound=Hashable)


class ReadBlocks(Generic[Block]):
    """Blocks of prompts; each stands for itself and all before it, so a prompt is known as far as its blocks are."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Block, None] = OrderedDict()

    def known(self, blocks: Sequence[Block]) -> int:
        """How many of a prompt's blocks, from the first, have been read."""
        return next((count for count, block in enumerate(blocks) if block not in self._blocks), len(blocks))

    def remember(self, blocks: Sequence[Block]) -> None:
        """A prompt with these blocks is read."""
        for block in blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > MOST:
            self._blocks.popitem(last=False)
