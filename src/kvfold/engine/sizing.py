"""What a sequence will hold under a method, from formats alone."""

from kvfold.engine.lane import MethodLane
from kvfold.kv.staged import StagedLayout
from kvfold.kv.tables import ENTRY_BYTES


def held_bytes(lane: MethodLane, tokens: int) -> int:
    """Bytes of pages, table entries and what is kept beside them when a context of `tokens` tokens has just been read
    and compressed.

    Where heads have budgets of their own the estimate is of equal ones: the page ends of each then add a page per head
    and class at most.
    """
    layout, staging = lane.layout, lane.staging
    if isinstance(layout, StagedLayout) and staging is not None:
        return layout.typical_pages(tokens) * (layout.page_bytes + ENTRY_BYTES) + staging.beside(tokens)
    return layout.pages(tokens) * (layout.page_bytes + ENTRY_BYTES)
