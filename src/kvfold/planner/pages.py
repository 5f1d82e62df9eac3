"""Pages that a sequence holds, by the method's own layout, remembered: a simulation asks for the same lengths often."""

from functools import cache

import numpy as np

from kvfold.engine.memory import GROWTH
from kvfold.kv.exponents import packed_size
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.kv.wire import FRAME_BYTES

Layout = CacheLayout | StagedLayout


class PageArithmetic:
    """What page tables of a layout do, without tables.

    Where tokens stand decides it for a sealed layout, exactly. Of a staged one only bounds are known, and for heads
    with budgets of their own (`uneven`) what an event leaves on average.
    chunk: most tokens of one sequence in one step.
    """

    def __init__(self, layout: Layout, chunk: int, uneven: bool = False) -> None:
        self.layout = layout
        self.page_bytes = layout.page_bytes
        self._staged = layout if isinstance(layout, StagedLayout) else None
        self._windowed = isinstance(layout, CacheLayout) and any(window is not None for window in layout.windows)
        self._chunk = chunk
        self._uneven = uneven
        # Caches of this object alone: they go when it goes.
        self._held = cache(self._count_held)
        self._reserved = cache(self._count_reserved)
        self._most = cache(self._count_most)
        self._sent = cache(self._count_sent)
        self.full = cache(self._count_full)
        self.longest = cache(self._longest)

    @property
    def layered(self) -> bool:
        """Whether layers may leave while later ones are computed."""
        return self._staged is None

    def next_event(self, position: int, context: int) -> int | None:
        """Where a step must end at the latest."""
        return None if self._staged is None else self._staged.next_event(position, context)

    def parts(self, length: int, context: int) -> tuple[int, ...]:
        """Bytes of the parts that hand a sequence over: what its pages have in use, layer by layer. A staged layout's
        are whole pages and one part, because nothing of it may leave before the event at the prompt's end."""
        return self._sent(length, context if self._staged else 0)

    def wire_bytes(self, length: int, context: int) -> int:
        """Bytes that hand a sequence over."""
        return sum(self.parts(length, context))

    def held(self, length: int, context: int) -> int:
        """Pages held between two steps with `length` tokens computed."""
        # Where the prompt ended matters to staged layouts alone: without it the same lengths come again and again.
        return self._held(length, context if self._staged else 0)

    def reserved(self, start: int, length: int, context: int) -> int:
        """Pages held while a step takes a sequence from `start` to `length` tokens."""
        if self._staged is None and not self._windowed:
            return self._held(length, 0)
        return self._reserved(start, length, context if self._staged else 0)

    def wanted(self, length: int, limit: int, computed: int, context: int) -> int:
        """Pages that a sequence of `length` tokens, `computed` of them in the cache, will hold in the near future."""
        ahead = min(length + GROWTH, limit)
        return self._most(ahead, computed >= context, context) if self._staged else self._most(ahead, False, 0)

    def _count_held(self, length: int, context: int) -> int:
        if isinstance(self.layout, CacheLayout):
            return self.layout.pages(length)
        return self._in_stages(self.layout, self._last_event(self.layout, length, context), length, context)

    def _count_reserved(self, start: int, length: int, context: int) -> int:
        if isinstance(self.layout, CacheLayout):
            return self.layout.pages(length, start)
        spare = self.layout.heads * len(self.layout.coded) if self.layout.is_event(length, context) else 0
        return spare + self._in_stages(self.layout, self._last_event(self.layout, start, context), length, context)

    def _count_sent(self, length: int, context: int) -> tuple[int, ...]:
        layout = self.layout
        if not isinstance(layout, CacheLayout):
            return (self.held(length, context) * self.page_bytes + FRAME_BYTES,)
        formats = [fmt for layer in layout.far for fmt in layer]
        block, size = (np.array(x) for x in zip(*((f.block, f.block_bytes) for f in formats), strict=True))
        gone = layout.live_rows(length) // layout.capacity * layout.capacity  # pages that every window left behind
        far = -(-(layout.far_tokens(length) - gone) // block) * size
        near = layout.near_slots(length) * layout.near.block_bytes
        recent = packed_size(near * layout.kv_heads, layout.near.key.raw_bits // 8) if near else 0
        used = far.reshape(layout.layers, layout.kv_heads).sum(1) + recent
        return tuple((used + FRAME_BYTES).tolist())

    def _count_full(self, length: int) -> int:
        """Pages of a prefix that nobody writes any more, and that all who go on from it share: full sealed ones."""
        layout = self.layout
        if self._windowed or not isinstance(layout, CacheLayout):
            return 0
        return int((layout.far_tokens(length) // layout.capacity).sum())

    def _count_most(self, length: int, compressed: bool, context: int) -> int:
        if isinstance(self.layout, StagedLayout) and compressed:
            return self.layout.pages(length, context)
        return self.layout.most_pages(length, self._chunk, context)

    def _longest(self, pages: int, limit: int, context: int) -> int:
        """The longest sequence up to `limit` tokens that `pages` pages surely hold."""
        return self.layout.longest(pages, limit, self._chunk, context)

    def _last_event(self, layout: StagedLayout, length: int, context: int) -> int:
        if length >= context:
            return context + (length - context) // layout.every * layout.every
        return 0 if layout.chunk is None else length // layout.chunk * layout.chunk

    def _in_stages(self, layout: StagedLayout, event: int, length: int, context: int) -> int:
        if not event:
            return layout.heads * -(-length // layout.raw.capacity)
        pages = layout.pages_after(event, context, length - event)
        if self._uneven and event >= context:
            # The bound gives every head a page end of its own; on average it is half of one.
            pages -= layout.pages_after(context, context) - layout.typical_pages(context, uneven=True)
        return max(pages, layout.heads)
