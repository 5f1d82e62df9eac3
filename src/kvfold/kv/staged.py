"""A cache that is compressed at events: tokens arrive uncompressed, and every so often some are dropped or coded.

Methods whose choice depends on what queries look at cannot say from a token's position alone how it is kept. Their
sequences hold several *tracks* per head: track 0 takes every new token uncompressed, the others hold coded tokens,
one track per class of precision. Events come at positions that depend on the request alone, so the result does not
depend on how the prompt was cut into chunks, on preemption, or on what else was in the batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.kv.format import PageFormat


@dataclass(frozen=True)
class Watch:
    """Which queries' attention is added up for every key, and how, until an event has used it.

    window: that many queries before each event, or that share of the context (None: all queries). probes: share of
    the earlier queries that are watched too, picked by a hash of their position. power: of the attention weight;
    power 0 counts the watched queries that could see a key. renewed: an event starts the sum from nothing again.
    Weights of the query heads that share a KV head are added.
    """

    window: int | float | None = None
    probes: float = 0.0
    power: int = 1
    renewed: bool = True

    def queries(self, first: int, count: int, event: int, context: int) -> Tensor:
        """Which of the queries at positions [first, first + count) count for the next event, bool [count]."""
        positions = torch.arange(first, first + count)
        if self.window is None:
            return torch.ones(count, dtype=torch.bool)
        window = self.window if isinstance(self.window, int) else max(1, round(self.window * context))
        last = positions >= event - window
        if not self.probes:
            return last
        # Multiplicative hashing (Knuth): spread evenly and the same in every run.
        picked = (positions * 2654435761) % 2**32 < self.probes * 2**32
        return last | picked


@dataclass(frozen=True)
class StagedLayout:
    """Formats, events and bounds of sequences under one staged method.

    raw: format of track 0, one token per block. coded: [class][layer][KV head] formats of the other tracks, and
    `shares` the largest share of a sequence's tokens that each class takes. windows: sliding window of each layer;
    heads of such layers keep the window's tokens uncompressed and nothing else.
    sinks, recent: first and newest tokens that are never coded; enough: tokens that must be there to code any.
    budget: tokens that a head keeps on average (a float: share of the context; None: all), `least` of them being
    protected. every: tokens between two events after the context; chunk: between two events within it (None: none).
    watches: what attention is added up.
    """

    raw: PageFormat
    windows: tuple[int | None, ...]
    kv_heads: int
    coded: tuple[tuple[tuple[PageFormat, ...], ...], ...] = ()
    shares: tuple[float, ...] = ()
    sinks: int = 0
    recent: int = 0
    enough: int = 0
    budget: int | float | None = None
    least: int = 1
    every: int = 32
    chunk: int | None = None
    watches: tuple[Watch, ...] = ()

    def __post_init__(self) -> None:
        formats = {fmt.page_bytes for track in self.coded for layer in track for fmt in layer}
        if not formats <= {self.raw.page_bytes}:
            raise ValueError("all formats of a layout share one page size")
        if self.raw.block != 1:
            raise ValueError("uncompressed pages are written token by token")
        if len(self.shares) != len(self.coded):
            raise ValueError("one share for each class")

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def heads(self) -> int:
        return self.layers * self.kv_heads

    @property
    def tracks(self) -> int:
        return 1 + len(self.coded)

    @property
    def page_bytes(self) -> int:
        return self.raw.page_bytes

    @property
    def code_bits(self) -> float:
        """Bits per element of coded tokens, page ends included, averaged over heads and classes."""
        per_token = (self.page_bytes / self.capacity).mean(1)
        coded = per_token[0] if not self.coded else float(np.dot(per_token[1:], self.shares))
        return coded * 8 / (2 * self.raw.head_dim)

    @cached_property
    def block(self) -> int:
        """Coded tokens of a head come in multiples of its format's block; this is the largest."""
        return max((fmt.block for track in self.coded for layer in track for fmt in layer), default=1)

    def format(self, track: int, layer: int, head: int) -> PageFormat:
        return self.raw if track == 0 else self.coded[track - 1][layer][head]

    @cached_property
    def capacity(self) -> NDArray[np.int64]:
        """Tokens per page, [tracks, layers * kv_heads]."""
        rows = [[self.raw.capacity] * self.heads]
        rows += [[fmt.capacity for layer in track for fmt in layer] for track in self.coded]
        return np.array(rows)

    @cached_property
    def windowed(self) -> NDArray[np.int64]:
        """Sliding window of each head's layer, 0 where there is none, [heads]."""
        return np.repeat([w or 0 for w in self.windows], self.kv_heads)

    def keep(self, context: int) -> int | None:
        """Tokens that a head keeps on average after an event, for a context of `context` tokens; None: all."""
        if self.budget is None:
            return None
        kept = self.budget if isinstance(self.budget, int) else round(self.budget * context)
        return max(kept, self.least)

    def next_event(self, position: int, context: int) -> int:
        """The first event after `position` tokens."""
        if position < context:
            return context if self.chunk is None else min(context, (position // self.chunk + 1) * self.chunk)
        return context + ((position - context) // self.every + 1) * self.every

    def is_event(self, length: int, context: int) -> bool:
        return length > 0 and self.next_event(length - 1, context) == length

    def pages_after(self, length: int, context: int, waiting: int = 0) -> int:
        """No fewer pages than an event leaves at `length` tokens, and `waiting` tokens that came since.

        Where heads have budgets of their own only their sum is known: each has a page end, and the longest may be those
        whose pages hold least.
        """
        return self._pages(length, context, waiting, unequal=self.budget is not None)

    def typical_pages(self, context: int, uneven: bool = False) -> int:
        """Pages that a context's event leaves; heads that have budgets of their own (`uneven`) are taken to be much
        like each other, with half a page end each."""
        ends = int((self.windowed == 0).sum()) * max(1, len(self.coded)) // 2
        return self._pages(context, context, 0, unequal=False) + (ends if uneven else 0)

    def _pages(self, length: int, context: int, waiting: int, unequal: bool) -> int:
        kept, near, raw = self.keep(context), self.sinks + self.recent, self.raw.capacity
        held = length if kept is None else min(kept, length)
        windowed = np.minimum(self.windowed[self.windowed > 0], length) + waiting
        pages = int((-(-windowed // raw)).sum())
        full = np.flatnonzero(self.windowed == 0)
        ends = len(full) if unequal else 0
        # As long as there is not enough to fit coordinates to, nothing is coded.
        uncoded = (min(held, near + self.enough) if self.coded else held) + waiting
        most = len(full) * uncoded // raw + ends if unequal else len(full) * -(-uncoded // raw)
        if not self.coded:
            return pages + most
        coded = len(full) * -(-(min(held, near + self.block - 1) + waiting) // raw)
        for share, capacity in zip(self.shares, self.capacity[1:, full], strict=True):
            pages_each = share * max(0, held - near) / capacity
            coded += int(np.ceil(np.full(len(full), pages_each.max(initial=0)) if unequal else pages_each).sum()) + ends
        return pages + max(coded, most)

    def pages(self, length: int, context: int | None = None) -> int:
        """No fewer pages than are held at `length` tokens, by default just after the context's event."""
        context = length if context is None else context
        return self.pages_after(length, context, 0 if length <= context else self.every)

    def most_pages(self, length: int, chunk: int = 1, context: int | None = None) -> int:
        """No fewer pages than a sequence holds at any time while it grows to `length` tokens, by default all context.

        chunk: of no account here; what matters is when events come.
        """
        context = length if context is None else context
        spare = self.heads * len(self.coded)
        inside = min(length, context)
        if self.chunk is None or inside <= self.chunk:
            peak = self.heads * -(-inside // self.raw.capacity)
        else:
            peak = self.pages_after(inside, context, self.chunk)
        if length > context:
            peak = max(peak, self.pages_after(length, context, self.every))
        return peak + spare

    def longest(self, pages: int, limit: int, chunk: int = 1, context: int | None = None) -> int:
        """The longest sequence up to `limit` tokens that `pages` pages surely hold."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.most_pages(middle, chunk, context) <= pages
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
