"""What all ranks know of a sequence's exchange: what travels, and in how many bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from kvfold.kv.layout import CacheLayout
from kvfold.parallel.far import HeadFormats, Partial
from kvfold.parallel.numbers import Numbers, as_bytes, from_bytes
from kvfold.parallel.wire import Message

NEAR, QUERIES, CODES, OUTPUTS, LSE = "near rows", "queries", "codes", "outputs", "log-sum-exp"
LSE_BYTES = 4

Made = TypeVar("Made")


@dataclass(frozen=True)
class Setting:
    """What is the same for all sequences and ranks: the cache's layout, query heads per KV head, and the bits of
    numbers on the wire (16: as uncompressed elements of the cache have)."""

    layout: CacheLayout
    group: int
    wire_bits: int = 16
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dim(self) -> int:
        return self.layout.near.head_dim

    @property
    def near_bytes(self) -> int:
        """One lent row of all heads of a layer: keys and values at full width, as near pages hold them."""
        return 2 * self.layout.kv_heads * self.dim * self.near_dtype.itemsize

    @property
    def near_dtype(self) -> torch.dtype:
        return torch.float32 if self.layout.near.key.raw_bits == 32 else torch.bfloat16

    def formats(self, layer: int, heads: tuple[int, ...]) -> HeadFormats:
        return self._once((layer, heads), lambda: HeadFormats(self.layout, layer, heads, self.wire_bits))

    def queries(self, layer: int, heads: tuple[int, ...]) -> Numbers:
        """Queries of these KV heads on the wire: the dimensions that sealed keys have."""
        return self._once(("queries", layer, heads), lambda: self._numbers(Numbers.queries, layer, heads, "key"))

    def outputs(self, layer: int, heads: tuple[int, ...]) -> Numbers:
        """Outputs on the wire: the dimensions that sealed values have."""
        return self._once(("outputs", layer, heads), lambda: self._numbers(Numbers.outputs, layer, heads, "value"))

    def _numbers(self, make: Callable[..., Numbers], layer: int, heads: tuple[int, ...], side: str) -> Numbers:
        rows = [getattr(self.layout.far[layer][head], side) for head in heads]
        return make(rows, self.group, self.dim, self.near_dtype, self.wire_bits)

    def _once(self, key: Any, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    def answer(self, layer: int, heads: tuple[int, ...], part: Partial) -> Message:
        """Attention of one rank for another."""
        return {OUTPUTS: self.outputs(layer, heads).pack(part.out), LSE: as_bytes(part.lse)}

    def answer_sizes(self, layer: int, heads: tuple[int, ...], queries: int) -> dict[str, int]:
        count = len(heads) * self.group
        return {OUTPUTS: self.outputs(layer, heads).nbytes(queries), LSE: queries * count * LSE_BYTES}

    def read_answer(self, layer: int, heads: tuple[int, ...], queries: int, message: Message) -> Partial:
        out = self.outputs(layer, heads).unpack(message[OUTPUTS], queries)
        return Partial(out, from_bytes(message[LSE], torch.float32).view(queries, len(heads) * self.group))

    def query_heads(self, heads: tuple[int, ...]) -> slice:
        """Query heads of consecutive KV heads."""
        return slice(heads[0] * self.group, (heads[-1] + 1) * self.group)
