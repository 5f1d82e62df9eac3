"""What a sequence will hold under a method, from formats alone."""

from kvfold.engine.lane import MethodLane
from kvfold.kv.staged import StagedLayout
from kvfold.kv.tables import ENTRY_BYTES


def held_bytes(lane: MethodLane, tokens: int) -> int:
    """Bytes of pages, table entries and what is kept beside them when a context of `tokens` tokens has just been read
    and compressed.

    Where heads have budgets of their own it is an estimate: the page ends of each are half a page.
    """
    layout, staging = lane.layout, lane.staging
    if isinstance(layout, StagedLayout) and staging is not None:
        pages = layout.typical_pages(tokens, staging.policy.uneven)
        return pages * (layout.page_bytes + ENTRY_BYTES) + staging.beside(tokens)
    return layout.pages(tokens) * (layout.page_bytes + ENTRY_BYTES)
