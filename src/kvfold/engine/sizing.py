"""What a sequence will hold under a method, from formats alone."""

from kvfold.engine.lane import MethodLane
from kvfold.kv.tables import ENTRY_BYTES


def held_bytes(lane: MethodLane, tokens: int) -> int:
    """Bytes of pages and table entries when a context of `tokens` tokens has just been read and compressed.

    Never too low; at most a page per head and class too high where heads have budgets of their own.
    """
    return lane.layout.pages(tokens) * (lane.layout.page_bytes + ENTRY_BYTES)
