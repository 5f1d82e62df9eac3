"""One query against all that a rank holds, by the same backends that serve a single worker."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.base import AttentionBackend, Plan, SequenceStep
from kvfold.kv.access import round_trip
from kvfold.kv.layout import CacheLayout
from kvfold.kv.packing import decode
from kvfold.kv.pool import NO_PAGE, PagePool, Pages
from kvfold.kv.tables import PageTables
from kvfold.parallel.far import HeadFormats, Partial
from kvfold.parallel.shard import FarShard

MOST = 0.75  # of a sum that one of its terms counted twice can be; a little above a half, for rounding


class ShardReader:
    """Backends attend to sealed rows and to the token itself, which is somewhere else here. So they are given a token
    that can be taken out again: a copy of the first key they read, with no value. Its share of the sum is never more
    than that of the rows, whose log-sum-exp is therefore left with all its digits.

    To a backend the shard is a sequence of sealed rows without sinks and recent ones, and what it writes for the token
    goes to a page that nobody reads.
    """

    def __init__(self, backend: AttentionBackend, pool: PagePool, layout: CacheLayout, heads: tuple[int, ...]) -> None:
        far = tuple(tuple(formats[head] for head in heads) for formats in layout.far)
        windows = (None,) * layout.layers
        self._layout = replace(layout, far=far, sinks=0, recent=0, windows=windows, sunk=())
        self._backend, self._pool = backend, pool
        self._scratch: Pages = pool.allocate(1)
        self._keys: dict[int, Tensor] = {}
        # What seals token by token would seal the one that is not there.
        self._possible = layout.exact or layout.seal > 1

    def pages(self) -> Pages:
        held: Pages = self._scratch[self._scratch != NO_PAGE]
        return held

    def release(self) -> None:
        self._pool.release(self._scratch)
        self._scratch = np.full_like(self._scratch, NO_PAGE)

    def plan(self, shard: FarShard) -> Plan | None:
        """For one query per layer without a window; None where nothing is held or backends cannot be asked."""
        if not self._possible or not len(shard.units):
            return None
        layout = self._layout
        tables = PageTables(layout)
        tables.length = len(shard.units) * layout.seal
        tables.near = np.full(tables.near.shape, self._scratch[0], np.int32)
        held = shard.tables.reshape(layout.layers * layout.kv_heads, -1)
        tables.far = np.full((len(held), held.shape[1] + 1), self._scratch[0], np.int32)
        tables.far[:, :-1] = np.where(held == NO_PAGE, self._scratch[0], held)
        return self._backend.plan(self._pool, layout, [SequenceStep(tables, 0, 1)], 1.0)

    def attend(self, plan: Plan, shard: FarShard, formats: HeadFormats, q: Tensor) -> Partial:
        """q: float32 [1, H, d] scaled."""
        if formats.layer not in self._keys:
            self._keys[formats.layer] = self._first_key(shard, formats)
        key = self._keys[formats.layer]
        out, lse = plan.attend(formats.layer, q, key[None], torch.zeros_like(key)[None])
        score = (q.unflatten(1, (len(key), -1)) * key[:, None]).sum(-1).flatten(1)
        share = (score - lse).exp().clamp(max=MOST)
        return Partial(out / (1 - share)[..., None], lse + (-share).log1p())

    def _first_key(self, shard: FarShard, formats: HeadFormats) -> Tensor:
        """The first key that each head holds, as near pages give it back, float32 [heads, d]."""
        keys = torch.zeros(len(formats.heads), formats.layout.near.head_dim)
        for (fmt, places), blocks in zip(formats.groups, shard.read(formats, 1), strict=True):
            keys[places, : fmt.key.kept] = decode(fmt, blocks[:, :1])[0][..., 0]
        return round_trip(self._layout.near, keys, keys)[0]
