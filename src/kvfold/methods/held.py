"""What a sequence under a staged method holds, as policies and encoders look at it."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kvfold.kv.access import read_blocks
from kvfold.kv.packing import decode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import Watch
from kvfold.kv.staged_tables import QueryRecord, StagedTables


class HeldRows:
    """The tokens held in every layer without a sliding window, oldest first; `layer` counts those layers alone.

    counts: tokens of each head, int64 [layers, G]; R is the largest. track, row: where each token is stored, int64
    [layers, G, R]; valid: which of the R are tokens. model_layers: the model's index of each layer.
    length: tokens computed; context: those of the prompt that come before the first event after it.
    """

    def __init__(self, pool: PagePool, tables: StagedTables) -> None:
        layout = tables.layout
        self.model_layers = [i for i, window in enumerate(layout.windows) if window is None]
        self.kv_heads = layout.kv_heads
        self.length, self.context = tables.length, tables.context
        self._tables = tables
        self._pool = pool
        shape = (len(self.model_layers), layout.kv_heads)
        rows = tables.rows.reshape(layout.tracks, layout.layers, layout.kv_heads)[:, self.model_layers]
        self.counts = torch.from_numpy(rows.sum(0))
        width = int(self.counts.max())
        sinks = np.minimum(layout.sinks, rows[0])
        # The first tokens of track 0 are older than all that is coded, the others are newer.
        runs = [(0, 0 * sinks, sinks), *((t, 0 * sinks, rows[t]) for t in range(1, layout.tracks))]
        runs.append((0, sinks, rows[0] - sinks))
        column = np.arange(width)
        track, row = np.zeros((*shape, width), np.int64), np.zeros((*shape, width), np.int64)
        begin = np.zeros(shape, np.int64)
        for index, start, count in runs:
            inside = (column >= begin[..., None]) & (column < (begin + count)[..., None])
            track[inside] = index
            row += np.where(inside, column - begin[..., None] + start[..., None], 0)
            begin = begin + count
        self.track, self.row = torch.from_numpy(track), torch.from_numpy(row)
        self.valid = torch.arange(width) < self.counts[..., None]
        self.rows = lru_cache(maxsize=1)(self._rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, KV heads, R)."""
        return len(self.model_layers), self.kv_heads, self.valid.shape[-1]

    def first(self, count: int) -> Tensor:
        """The oldest `count` tokens of every head, bool [layers, G, R]."""
        return self.valid & (torch.arange(self.valid.shape[-1]) < count)

    def newest(self, count: int) -> Tensor:
        """The newest `count` tokens of every head, bool [layers, G, R]."""
        return self.valid & (torch.arange(self.valid.shape[-1]) >= self.counts[..., None] - count)

    def mass(self, watch: Watch) -> Tensor:
        """Attention that each token received, float32 [layers, G, R]; 0 where there is no token."""
        shape = (len(self._tables.layout.windows), self.kv_heads, -1)
        found = torch.zeros(self.shape)
        for track, mass in enumerate(self._tables.mass[watch]):
            if not mass.shape[1]:
                continue
            own = mass.view(shape)[self.model_layers].gather(2, self.row.clamp(max=mass.shape[1] - 1))
            found = torch.where((self.track == track) & self.valid, own, found)
        return found

    def record(self, name: str) -> QueryRecord:
        return self._tables.records[name]

    def _rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer in the model's own coordinates, float32 [G, R, d]; 0 where no token is."""
        layout, tables = self._tables.layout, self._tables
        model_layer = self.model_layers[layer]
        out = torch.zeros(2, self.kv_heads, self.valid.shape[-1], layout.raw.head_dim)
        for head in range(self.kv_heads):
            for track in range(layout.tracks):
                flat = model_layer * self.kv_heads + head
                count = int(tables.rows[track, flat])
                if not count:
                    continue
                here = (self.track[layer, head] == track) & self.valid[layer, head]
                basis = tables.bases[track - 1] if track else None
                frames = (None, None) if basis is None else (basis.key, basis.value)
                for side, frame, u in zip(out, frames, stored_rows(self._pool, tables, track, flat), strict=True):
                    x = u[None, :count]
                    if frame is not None:
                        x = frame.lift(model_layer, torch.tensor([head]), x)
                        if frame.origin is not None:
                            x = x + frame.origin[model_layer, head]
                    side[head, here, : x.shape[-1]] = x[0]
        return out[0], out[1]


def stored_blocks(pool: PagePool, tables: StagedTables, track: int, head: int) -> Tensor:
    """All blocks of the pages of one head's track, uint8 [B, block_bytes]; head counts over all layers."""
    fmt = tables.layout.format(track, *divmod(head, tables.layout.kv_heads))
    columns = -(-int(tables.rows[track, head]) // fmt.capacity)
    pages = torch.from_numpy(tables.pages_of[track, head, :columns]).long()
    return read_blocks(pool.data, fmt, pages[None])[0]


def stored_rows(pool: PagePool, tables: StagedTables, track: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head's track as they are stored, float32 [rows, kept] each."""
    fmt = tables.layout.format(track, *divmod(head, tables.layout.kv_heads))
    keys, values = decode(fmt, stored_blocks(pool, tables, track, head)[None])
    count = int(tables.rows[track, head])
    return keys[0].T[:count], values[0].T[:count]
