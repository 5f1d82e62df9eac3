"""One worker: the reference backend over one sequence, whose pages stay to be looked at."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.base import SequenceStep
from kvfold.attention.reference import ReferenceBackend
from kvfold.engine.lane import build_lane
from kvfold.kv.access import read_blocks
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables
from kvfold.methods.registry import build_method
from kvfold.model.decoder import Lane
from kvfold.model.loading import LoadedModel


class Single:
    def __init__(self, model: LoadedModel, statistics: Mapping[str, Tensor], method: str) -> None:
        self.decoder = model.decoder
        self.lane = build_lane(model.decoder, method, build_method(method), 32, statistics)
        assert isinstance(self.lane.layout, CacheLayout)
        self.layout = self.lane.layout
        self.pool = PagePool(4096, self.layout.page_bytes)
        self.tables = PageTables(self.layout)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Tensor:
        """Appends tokens; logits after the last one, float32 [V]."""
        start, end = self.tables.length, self.tables.length + len(ids)
        self.tables.reserve(self.pool, end)
        step = SequenceStep(self.tables, 0, len(ids))
        plan = ReferenceBackend().plan(self.pool, self.layout, [step], self.decoder.spec.attention_scale)
        lane = Lane(slice(0, len(ids)), self.lane.weights, lambda *args: plan.attend(*args)[0])
        hidden = self.decoder.forward(torch.tensor(ids), torch.arange(start, end), [lane])
        self.tables.advance(self.pool, end)
        return self.decoder.logits(hidden[-1:])[0]

    def blocks(self, layer: int, head: int) -> Tensor:
        """Sealed blocks of a head, uint8 [blocks, bytes]."""
        fmt = self.layout.far[layer][head]
        count = self.layout.far_tokens(self.tables.length) // fmt.block
        pages = self.tables.far[layer * self.layout.kv_heads + head].astype(np.int64)
        return read_blocks(self.pool.data, fmt, torch.from_numpy(pages)[None])[0, :count]
