"""How one method keeps one model's cache: the formats of every head and which token is where."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvfold.kv.format import PageFormat


@dataclass(frozen=True)
class CacheLayout:
    """Formats and boundaries of a sequence's cache under one method.

    far: [layer][KV head] formats of the sealed pages; near: the format of sinks and recent tokens (one token
    per block); windows: sliding window of each layer in tokens, or None.

    With n tokens in the cache, the first `sinks` and the last `n - sealed(n)` of them are *near*, the others
    *far*. What a query sees as near and far depends on its position alone, so the result does not depend on how
    a prompt was cut into chunks, on preemption, or on what else was in the batch.
    """

    far: tuple[tuple[PageFormat, ...], ...]
    near: PageFormat
    sinks: int
    recent: int
    windows: tuple[int | None, ...]
    exact: bool = False  # sealed pages read back what was written: no near pages, everything is sealed at once
    sunk: tuple[bool, ...] = ()  # layers whose window does not hide the sinks (empty: none)

    def __post_init__(self) -> None:
        sizes = {fmt.page_bytes for layer in self.far for fmt in layer} | {self.near.page_bytes}
        if len(sizes) != 1:
            raise ValueError("all formats of a layout share one page size")
        if any(self.seal % fmt.block or fmt.capacity % self.seal for layer in self.far for fmt in layer):
            raise ValueError("pages hold whole seal units and seal units whole blocks")
        if self.near.block != 1:
            raise ValueError("near pages are written token by token")

    def keeps_sinks(self, layer: int) -> bool:
        """Whether every query of a layer sees the sinks, however far behind its window they are."""
        return bool(self.sunk) and self.sunk[layer]

    @property
    def layers(self) -> int:
        return len(self.far)

    @property
    def kv_heads(self) -> int:
        return len(self.far[0])

    @property
    def page_bytes(self) -> int:
        return self.near.page_bytes

    @property
    def code_bits(self) -> float:
        """Bits per element of far pages, page ends included, averaged over heads."""
        per_token = [fmt.bytes_per_token for layer in self.far for fmt in layer]
        return sum(per_token) * 8 / (len(per_token) * 2 * self.near.head_dim)

    @cached_property
    def seal(self) -> int:
        """Tokens sealed together."""
        return max(fmt.block for layer in self.far for fmt in layer)

    @cached_property
    def capacity(self) -> NDArray[np.int64]:
        """Tokens per far page, [layers * kv_heads]."""
        return np.array([fmt.capacity for layer in self.far for fmt in layer])

    @cached_property
    def ring(self) -> int:
        """Slots for recent tokens: what is left in 16 bits just before the next unit is sealed."""
        return self.recent + self.seal - 1

    @cached_property
    def near_pages(self) -> int:
        """Near pages per head once the sequence is long."""
        return 0 if self.exact else -(-(self.sinks + self.ring) // self.near.capacity)

    @cached_property
    def first_live(self) -> NDArray[np.int64]:
        """Per head the window of its layer, or a number above every length, [layers * kv_heads]."""
        unlimited = np.iinfo(np.int64).max // 2
        return np.repeat([unlimited if w is None else w for w in self.windows], self.kv_heads)

    def sealed(self, length: int) -> int:
        """Position of the first recent token when the cache holds `length` tokens, the newest included."""
        if self.exact:
            return length
        return self.sinks + max(0, (length - self.sinks - self.recent) // self.seal) * self.seal

    def sealed_each(self, lengths: Tensor) -> Tensor:
        """`sealed` of each length, int64."""
        if self.exact:
            return lengths
        units = (lengths - self.sinks - self.recent).div(self.seal, rounding_mode="floor").clamp(min=0)
        return self.sinks + units * self.seal

    def far_tokens(self, length: int) -> int:
        """Tokens in sealed pages; position `p` of them is row `p - sinks` (0 sinks where the layout is exact)."""
        return self.sealed(length) - self.sinks

    def near_slots(self, length: int) -> int:
        """Slots of near pages in use."""
        return 0 if self.exact else min(length, self.sinks + self.ring)

    def slot_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slot of near pages that each position has for as long as it is near: sinks first, then a ring."""
        ring = self.sinks + (positions - self.sinks) % max(self.ring, 1)
        return np.where(positions < self.sinks, positions, ring)

    def seen_near(self, queries: Tensor, rows: Tensor, window: int | None, keeps_sinks: bool) -> Tensor:
        """Which rows each query sees in 16 bits: bool [..., Lq, n].

        queries, rows: positions, int64 [..., Lq] and [..., n], -1 for no row. In an exact layout that is all rows up to
        the query, as it is only asked about those that come with it.
        """
        at, keys = queries[..., None], rows[..., None, :]
        mask = (keys >= 0) & (keys <= at)
        if not self.exact:
            mask &= (keys < self.sinks) | (keys >= self.sealed_each(queries + 1)[..., None])
        if window is None:
            return mask
        inside = keys > at - window
        return mask & (inside | (keys < self.sinks) if keeps_sinks else inside)

    def pages(self, length: int, start: int | None = None) -> int:
        """Pages held over all layers and heads with `length` tokens, of which those from `start` are being added."""
        last = -(-self.far_tokens(length) // self.capacity)
        first = self.live_rows(length if start is None else start) // self.capacity
        near = -(-self.near_slots(length) // self.near.capacity)
        return int(np.maximum(last - first, 0).sum()) + self.layers * self.kv_heads * near

    def live_rows(self, length: int) -> NDArray[np.int64]:
        """Per head the first far row that a query at position `length` or later can see, [layers * kv_heads]."""
        return np.clip(length - self.first_live + 1 - self.sinks, 0, self.far_tokens(length))

    def most_pages(self, length: int, chunk: int, context: int | None = None) -> int:
        """No fewer pages than a sequence holds at any time while it grows to `length` tokens, `chunk` at a time.

        context: of no account here, unlike in a staged layout.
        Behind a window pages come and go, and how many there are depends on where the window's ends fall in them.
        """
        far = -(-self.far_tokens(length) // self.capacity)
        # Rows from the first that the oldest new query sees to the last that is sealed, or, where the window is
        # shorter than what stays near, the rows that are being sealed; in pages, at worst offset.
        rows = np.maximum(self.first_live - 1 - self.recent, self.seal - 1) + chunk
        near = -(-self.near_slots(length) // self.near.capacity)
        held = np.minimum(far, (rows + self.capacity - 2) // self.capacity + 1)
        return int(held.sum()) + self.layers * self.kv_heads * near

    def longest(self, pages: int, limit: int, chunk: int = 1, context: int | None = None) -> int:
        """The longest sequence up to `limit` tokens that `pages` pages surely hold while it grows by `chunk` tokens."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.most_pages(middle, chunk) <= pages else (low, middle - 1)
        return low
