"""One sequence over the ranks: its prompt, then a token at a time. The same calls on every rank."""

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, Plan
from kvfold.kv.access import round_trip
from kvfold.kv.pool import PagePool, Pages
from kvfold.parallel.exchange import borrow, ring, ulysses
from kvfold.parallel.far import Partial, attend_far
from kvfold.parallel.near import attend_near
from kvfold.parallel.reading import ShardReader
from kvfold.parallel.setting import CODES, QUERIES, Setting
from kvfold.parallel.shard import FarShard, Index, NearRows, held_bytes
from kvfold.parallel.split import Split
from kvfold.parallel.wire import Message, Wire


class ShardedSequence:
    """Rank 0 computes the tokens after the prompt: it holds the near rows and asks all ranks for attention to the
    sealed ones. `length` tokens are in the cache. Raises PoolExhausted where this rank has no room for the prompt.
    """

    def __init__(
        self, setting: Setting, split: Split, wire: Wire, pool: PagePool, scale: float, backend: AttentionBackend
    ) -> None:
        self.length = split.length
        self.shard = FarShard(pool, setting.layout, split.heads[wire.rank])
        self.reader = ShardReader(backend, pool, setting.layout, split.heads[wire.rank])
        self.near: NearRows | None = None
        self._setting, self._split, self._wire, self._pool, self._scale = setting, split, wire, pool, scale
        self.shard.grow(self._prompt_units(), split.length)
        if wire.rank == 0:
            self.near = NearRows(pool, setting.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of pages and tables that this rank holds."""
        return held_bytes(self._pool.page_bytes, sum(map(len, self.pages())))

    def pages(self) -> list[Pages]:
        """Every page held, by who holds it."""
        return [each.pages() for each in (self.shard, self.reader, self.near) if each is not None]

    def release(self) -> None:
        """Gives every page back."""
        self.shard.release()
        self.reader.release()
        if self.near is not None:
            self.near.release()

    def read_prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's part of the prompt in one layer, as `Decoder` asks for it."""
        setting, split, wire, layout = self._setting, self._split, self._wire, self._setting.layout
        positions = split.positions[wire.rank]
        k, v = _stored(setting, k, v)
        keys, values, rows = borrow(setting, split, wire, k, v)
        result = attend_near(layout, layer, q.float() * self._scale, positions, keys, values, rows)
        sealing = _rows_of(layout.sinks, layout.seal, _units(split, wire.rank))
        own = torch.from_numpy(np.searchsorted(positions, sealing))
        every = setting.formats(layer, tuple(range(layout.kv_heads)))
        blocks = every.encode(k[own], v[own])
        exchange = ring if split.variant == "ring" else ulysses
        far = exchange(setting, split, wire, layer, q, blocks, self.shard, self._scale)
        result.add(far, queries=slice(len(q) - len(far.out), None))
        if self.near is not None:
            stay = (rows < layout.sinks) | (rows >= layout.sealed(split.length))
            which = torch.from_numpy(np.flatnonzero(stay))
            self.near.write(layer, rows[stay], keys[which], values[which])
        return result.out.to(q.dtype)

    def end_prompt(self) -> None:
        self.shard.advance(self.length)

    def add_token(self) -> "Turn":
        """The next token, at position `length`: makes room for what it seals."""
        layout, position = self._setting.layout, self.length
        before, after = layout.sealed(position), layout.sealed(position + 1)
        unit = (before - layout.sinks) // layout.seal if after > before else None
        if unit is not None and self._keeps(unit, self._wire.rank):
            self.shard.grow(np.array([unit]), position)
        return Turn(self, unit)

    def _keeps(self, unit: int, rank: int) -> bool:
        return self._split.variant == "ulysses" or self._split.unit_owner(unit) == rank

    def _prompt_units(self) -> Index:
        if self._split.variant == "ring":
            return _units(self._split, self._wire.rank)
        layout = self._setting.layout
        return np.arange((layout.sealed(self._split.length) - layout.sinks) // layout.seal)


class Turn:
    """One token after the prompt. On rank 0 `attend` serves the decoder; the other ranks `serve` each layer."""

    def __init__(self, sequence: ShardedSequence, unit: int | None) -> None:
        self._sequence, self._unit = sequence, unit
        self._setting, self._wire = sequence._setting, sequence._wire
        self._heads = sequence._split.heads
        self._where = np.array([sequence.length])
        layout = self._setting.layout
        held = np.arange(layout.sealed(sequence.length), sequence.length)
        self._held = np.concatenate([np.arange(min(layout.sinks, sequence.length)), held[held >= layout.sinks]])
        self._plan: Plan | None = None
        self._planned = False
        self._asked = layout.sealed(sequence.length + 1) > layout.sinks

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, d], k and v [1, G, d]."""
        setting, wire, near, layout = self._setting, self._wire, self._sequence.near, self._setting.layout
        assert near is not None, "rank 0 computes"
        k, v = _stored(setting, k, v)
        held_k, held_v = near.read(layer, self._held)
        keys, values = torch.cat([held_k, k]), torch.cat([held_v, v])
        rows = np.concatenate([self._held, self._where])
        sealed: tuple[Tensor, Tensor] | None = None
        if self._unit is not None:
            start = layout.sinks + self._unit * layout.seal
            which = torch.from_numpy(np.flatnonzero((rows >= start) & (rows < start + layout.seal)))
            sealed = keys[which], values[which]
        others = range(1, wire.ranks) if self._asked else range(0)
        wait = wire.pass_on(
            [(rank, self._question(layer, rank, q, sealed)) for rank in others],
            [(rank, setting.answer_sizes(layer, self._heads[rank], 1)) for rank in others],
        )
        scaled = q.float() * self._sequence._scale
        result = attend_near(layout, layer, scaled, self._where, keys, values, rows)
        if self._asked:
            own = self._heads[0]
            if sealed is not None and self._sequence._keeps(self._unit or 0, 0):
                formats = setting.formats(layer, own)
                self._store(layer, formats.encode(*(x[:, list(own)] for x in sealed)))
            part = self._far(layer, scaled[:, setting.query_heads(own)])
            result.add(part, heads=setting.query_heads(own))
        for rank, message in zip(others, wait(), strict=True):
            heads = self._heads[rank]
            result.add(setting.read_answer(layer, heads, 1, message), heads=setting.query_heads(heads))
        position = self._sequence.length
        if position < layout.sinks or position >= layout.sealed(position + 1):
            near.write(layer, self._where, k, v)
        return result.out.to(q.dtype)

    def serve(self, layer: int) -> None:
        """Answers rank 0 for this rank's rows."""
        if not self._asked:
            return
        setting, wire = self._setting, self._wire
        heads = self._heads[wire.rank]
        sizes = {QUERIES: setting.queries(layer, heads).nbytes(1)}
        formats = setting.formats(layer, heads)
        mine = self._unit is not None and self._sequence._keeps(self._unit, wire.rank)
        if mine:
            sizes[CODES] = formats.nbytes(1)
        message = wire.pass_on([], [(0, sizes)])()[0]
        if mine:
            self._store(layer, formats.unpack(message[CODES]))
        q = setting.queries(layer, heads).unpack(message[QUERIES], 1) * self._sequence._scale
        wire.pass_on([(0, setting.answer(layer, heads, self._far(layer, q)))], [])()

    def end(self) -> None:
        self._sequence.length += 1
        self._sequence.shard.advance(self._sequence.length)

    def _question(self, layer: int, rank: int, q: Tensor, sealed: tuple[Tensor, Tensor] | None) -> Message:
        setting, heads = self._setting, self._heads[rank]
        message = {QUERIES: setting.queries(layer, heads).pack(q[:, setting.query_heads(heads)])}
        if sealed is not None and self._sequence._keeps(self._unit or 0, rank):
            formats = setting.formats(layer, heads)
            message[CODES] = formats.pack(formats.encode(*(x[:, list(heads)] for x in sealed)))
        return message

    def _store(self, layer: int, blocks: list[Tensor]) -> None:
        shard = self._sequence.shard
        shard.write(self._setting.formats(layer, self._heads[self._wire.rank]), len(shard.units) - 1, blocks)

    def _far(self, layer: int, q: Tensor) -> Partial:
        shard, formats = self._sequence.shard, self._setting.formats(layer, self._heads[self._wire.rank])
        if not self._planned:
            self._plan, self._planned = self._sequence.reader.plan(shard), True
        if self._plan is None or self._setting.layout.windows[layer] is not None:
            return attend_far(formats, q, self._where, shard.read(formats), shard.units)
        return self._sequence.reader.attend(self._plan, shard, formats, q)


def _stored(setting: Setting, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as near pages give them back, float32."""
    return round_trip(setting.layout.near, k.float(), v.float()) if len(k) else (k.float(), v.float())


def _units(split: Split, rank: int) -> Index:
    ranges = [np.arange(units.first, units.last) for units in split.units(rank)]
    return np.concatenate([np.empty(0, np.int64), *ranges]).astype(np.int64)


def _rows_of(sinks: int, seal: int, units: Index) -> Index:
    """Positions of the rows of units."""
    rows: Index = (sinks + units[:, None] * seal + np.arange(seal)).ravel()
    return rows
