"""What a sequence will hold under a method, from formats alone."""

from kvfold.engine.lane import MethodLane
from kvfold.kv.tables import ENTRY_BYTES


def held_bytes(lane: MethodLane, tokens: int) -> int:
    """Bytes of pages, table entries and what is kept beside them when a context of `tokens` tokens has just been read
    and compressed.

    Where heads have budgets of their own: at most a page per head and class too high, and too low by what observed
    attention takes where the longest head is longer than the average.
    """
    beside = 0 if lane.staging is None else lane.staging.beside(tokens)
    return lane.layout.pages(tokens) * (lane.layout.page_bytes + ENTRY_BYTES) + beside
