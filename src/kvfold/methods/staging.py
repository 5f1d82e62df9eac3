"""An event: the policy chooses, the encoder codes, the pages of what is dropped go back to the pool."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.kv.access import write_blocks
from kvfold.kv.format import PageFormat
from kvfold.kv.packing import encode, take_tokens
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout, Watch
from kvfold.kv.staged_tables import QueryRecord, StagedTables
from kvfold.methods.base import Encoder
from kvfold.methods.choice import choose
from kvfold.methods.held import HeldRows, stored_blocks, stored_rows
from kvfold.methods.policy import Policy

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Staging:
    """A policy and an encoder (None: what stays is not coded) made ready for one model."""

    policy: Policy
    encoder: Encoder | None
    layout: StagedLayout
    records: Mapping[str, Callable[[], QueryRecord]]

    def settle(self, pool: PagePool, tables: StagedTables) -> None:
        """Runs the event at the tables' present length. Never takes more pages than it gives back and are spare."""
        held = HeldRows(pool, tables)
        keep, scores = choose(self.policy, held, self.layout)
        classes, keep = self._classes(held, keep, scores, tables)
        if self.encoder is not None and self.encoder.fit is not None and self._unfitted(tables) and classes.any():
            tables.bases = list(self.encoder.fit(held, classes.masked_fill(~keep, 0)))
        merge = self.policy.merge(held, scores, keep)
        mass = {w: [_left(held.mass(w), keep & (classes == t)) for t in range(self.layout.tracks)] for w in self._kept}
        tables.release_spare(pool)
        rewrite = _Rewrite(pool, tables)
        for layer, model_layer in enumerate(held.model_layers):
            merged = None if merge is None else merge(layer)
            for head in range(held.kv_heads):
                own = None if merged is None else (merged[0][head], merged[1][head])
                rewrite.head(held, (layer, head), model_layer, keep[layer, head], classes[layer, head], own)
        rewrite.windows()
        shape = (self.layout.layers, self.layout.kv_heads)
        tables.mass = {
            w: [torch.zeros(self.layout.heads, int(n.max())) for n in tables.rows] for w in self.layout.watches
        }
        for watch, tracks in mass.items():
            for new, found in zip(tables.mass[watch], tracks, strict=True):
                new.view(*shape, -1)[held.model_layers] = found[..., : new.shape[1]]
        wanted = self._lasting if not self._unfitted(tables) else set(self.records)
        tables.records = {name: r for name, r in tables.records.items() if name in wanted}
        tables.settled = tables.length

    def beside(self, context: int) -> int:
        """Bytes that a sequence holds beside its pages when a context of `context` tokens has just been compressed."""
        # The sums of all heads are as wide as those of the longest, which may have kept everything.
        rows = context if self.policy.uneven else self.layout.keep(context) or context
        observed = 4 * self.layout.heads * min(rows, context) * len(self.layout.watches)
        lasting = sum(self.records[name]().nbytes for name in self._lasting)
        return observed + lasting + (0 if self.encoder is None else self.encoder.basis_bytes)

    @property
    def _kept(self) -> list[Watch]:
        """Watches whose sums go on after an event."""
        return [watch for watch in self.layout.watches if not watch.renewed]

    @property
    def _lasting(self) -> set[str]:
        """Records that later events need too; an encoder looks at the first event alone."""
        return set(self.records) - set(self.encoder.records if self.encoder is not None else {})

    def _unfitted(self, tables: StagedTables) -> bool:
        """Whether coordinates are still to be made."""
        fits = self.encoder is not None and self.encoder.fit is not None
        return fits and all(basis is None for basis in tables.bases)

    def _classes(self, held: HeldRows, keep: Tensor, scores: Tensor, tables: StagedTables) -> tuple[Tensor, Tensor]:
        """Track that each token goes to, int64 [layers, G, R], and which stay: whole blocks of each class."""
        if self.encoder is None:
            return torch.zeros_like(held.track), keep
        # By rank among those that stay: the first and the newest are not coded.
        order = keep.cumsum(-1)
        inner = (order > self.encoder.sinks) & (order <= order[..., -1:] - self.encoder.recent)
        fresh = keep & (held.track == 0) & inner
        if self._unfitted(tables) and fresh.sum() < self.encoder.enough * fresh.shape[0] * fresh.shape[1]:
            fresh = torch.zeros_like(fresh)
        classified = (
            torch.ones_like(held.track) if self.encoder.classify is None else self.encoder.classify(held, fresh)
        )
        classes = torch.where(fresh, classified, held.track)
        keep = keep.clone()
        for layer, model_layer in enumerate(held.model_layers):
            for head in range(held.kv_heads):
                for track in range(1, self.layout.tracks):
                    block = self.layout.format(track, model_layer, head).block
                    mine = keep[layer, head] & (classes[layer, head] == track)
                    new = (mine & fresh[layer, head]).nonzero()[:, 0]
                    over = int(mine.sum()) % block
                    if not over:
                        continue
                    waiting = min(over, len(new))
                    if waiting:
                        classes[layer, head, new[-waiting:]] = 0
                    if waiting < over:
                        # Too few came to make up for what was dropped: the least of the others goes with it.
                        old = (mine & ~fresh[layer, head]).nonzero()[:, 0]
                        worst = scores[layer, head, old].argsort(stable=True)[: over - waiting]
                        keep[layer, head, old[worst]] = False
        return classes, keep


class _Rewrite:
    """Puts the tokens that stay where they belong, head by head. Heads count over all layers."""

    def __init__(self, pool: PagePool, tables: StagedTables) -> None:
        self._pool = pool
        self._tables = tables
        self._layout = tables.layout

    def head(
        self,
        held: HeldRows,
        where: tuple[int, int],
        model_layer: int,
        keep: Tensor,
        classes: Tensor,
        merged: Rows | None,
    ) -> None:
        """keep, classes: [R]; merged: keys and values [R, d] to put in the place of those that are not coded."""
        track, row = held.track[where], held.row[where]
        head = model_layer * held.kv_heads + where[1]
        moving = keep & (track == 0) & (classes > 0)
        arriving: dict[int, Rows] = {}
        if moving.any():
            keys, values = stored_rows(self._pool, self._tables, 0, head)
            for t in range(1, self._layout.tracks):
                own = row[moving & (classes == t)]
                arriving[t] = keys[own], values[own]
        stays = keep & (track == 0) & (classes == 0)
        self._raw(head, row[stays], None if merged is None else (merged[0][stays], merged[1][stays]))
        for t in range(1, self._layout.tracks):
            self._coded(t, head, row[keep & (track == t)], arriving.get(t))

    def windows(self) -> None:
        """Heads with a sliding window keep its tokens, whatever the policy."""
        for head in self._layout.windowed.nonzero()[0].tolist():
            rows, window = int(self._tables.rows[0, head]), int(self._layout.windowed[head])
            self._raw(head, torch.arange(max(0, rows - window), rows), None)

    def _raw(self, head: int, rows: Tensor, replaced: Rows | None) -> None:
        fmt = self._layout.raw
        if replaced is not None:
            blocks = encode(fmt, *(x[:, None] for x in replaced))
        elif len(rows) < self._tables.rows[0, head]:
            blocks = take_tokens(fmt, stored_blocks(self._pool, self._tables, 0, head), rows)
        else:
            return
        self._tables.replace(self._pool, 0, head, len(rows))
        self._write(0, head, 0, blocks)

    def _coded(self, track: int, head: int, rows: Tensor, arriving: Rows | None) -> None:
        tables, count = self._tables, int(self._tables.rows[track, head])
        fmt = self._layout.format(track, *divmod(head, self._layout.kv_heads))
        new = 0 if arriving is None else len(arriving[0])
        if len(rows) == count and not new:
            return
        blocks = self._encoded(fmt, track, head, arriving) if arriving is not None and new else None
        if blocks is not None and len(rows) == count:
            tables.extend(self._pool, track, head, count + new)
            self._write(track, head, count // fmt.block, blocks)
            return
        stored = stored_blocks(self._pool, tables, track, head)
        tokens = torch.cat([rows, len(stored) * fmt.block + torch.arange(new)])
        taken = take_tokens(fmt, stored if blocks is None else torch.cat([stored, blocks]), tokens)
        tables.replace(self._pool, track, head, len(tokens))
        self._write(track, head, 0, taken)

    def _encoded(self, fmt: PageFormat, track: int, head: int, rows: Rows) -> Tensor:
        """Blocks of keys and values [n, d], the last one filled up with zeros."""
        layer, kv_head = divmod(head, self._layout.kv_heads)
        basis = self._tables.bases[track - 1]
        sides = []
        for x, frame in zip(rows, (None, None) if basis is None else (basis.key, basis.value), strict=True):
            u = x if frame is None else frame.into(layer, torch.tensor([kv_head]), x[None])[0]
            sides.append(torch.nn.functional.pad(u, (0, 0, 0, -len(u) % fmt.block)).unflatten(0, (-1, fmt.block)))
        return encode(fmt, *sides)

    def _write(self, track: int, head: int, first: int, blocks: Tensor) -> None:
        """Writes blocks uint8 [B, block_bytes] from the `first`-th block of a track on."""
        fmt = self._layout.format(track, *divmod(head, self._layout.kv_heads))
        index = first + torch.arange(len(blocks))
        pages = torch.from_numpy(self._tables.pages_of[track, head]).long()[index // fmt.blocks]
        write_blocks(self._pool.data, fmt, pages, index % fmt.blocks, blocks)


def _left(values: Tensor, mask: Tensor) -> Tensor:
    """The values [..., R] where the mask is set, moved to the front; 0 behind them."""
    order = (~mask).byte().argsort(dim=-1, stable=True)
    return values.masked_fill(~mask, 0).gather(-1, order)
