"""Coded rows from event to event: what stays is bit for bit what it was, whatever is dropped or coded beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvfold.kv.pool import PagePool
from kvfold.kv.staged_tables import StagedTables
from kvfold.methods.held import HeldRows, stored_rows
from kvfold.methods.staging import Staging
from tests.engine.tiny import Tiny, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
Snapshot = dict[tuple[int, int], Tensor]


def snapshot(pool: PagePool, tables: StagedTables) -> Snapshot:
    """(track, head) -> keys and values side by side, as stored."""
    tracks, heads = range(tables.layout.tracks), range(tables.layout.heads)
    return {(t, h): torch.cat(stored_rows(pool, tables, t, h), 1) for t in tracks for h in heads if tables.rows[t, h]}


@dataclass
class Event:
    before: Snapshot
    after: Snapshot


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every event of every sequence, in order."""
    seen: list[Event] = []
    settle = Staging.settle

    def watched(self: Staging, pool: PagePool, tables: StagedTables) -> None:
        before = snapshot(pool, tables)
        settle(self, pool, tables)
        seen.append(Event(before, snapshot(pool, tables)))

    monkeypatch.setattr(Staging, "settle", watched)
    return seen


def survivors(before: Tensor, after: Tensor) -> int:
    """How many of the first rows afterwards are rows from before, in their old order."""
    kept, row = 0, 0
    for new in after:
        while row < len(before) and not torch.equal(before[row], new):
            row += 1
        if row == len(before):
            break
        kept, row = kept + 1, row + 1
    return kept


CODECS = [
    "kivi(recent=16,group=16)", "kivi(bits=4,recent=16,group=8)", "int8(recent=16)", "int4(recent=16)",
    "hack(recent=16,partition=16)", "think(recent=16)", "decoquant(recent=16)", "zipcache(recent=16,every=32)",
    "zeroc(bits=3,recent=16)", "zeroc(bits=3,salient_bits=6,salient=0.2,recent=16)",
]  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_coded_rows_that_stay_are_what_they_were(tiny: GetTiny, events: list[Event], codec: str) -> None:
    engine = tiny("llama").engine(f"h2o(budget=180)+{codec}", prefix_caching=False, chunk=70)
    run(engine, [tokens(220, 4)], greedy(100), each_step=engine.check_integrity)
    assert len(events) == 4
    survived = dropped = 0
    for event in events[1:]:
        for (track, head), after in event.after.items():
            before = event.before.get((track, head))
            if not track or before is None:
                continue
            kept = survivors(before, after)
            survived, dropped = survived + kept, dropped + len(before) - kept
            # Whatever did not survive has just been coded: no more than what waited uncompressed.
            assert len(after) - kept <= len(event.before[0, head])
    assert survived > 100
    assert dropped > 0


@pytest.mark.parametrize("codec", CODECS)
def test_without_a_policy_nothing_coded_ever_changes(tiny: GetTiny, events: list[Event], codec: str) -> None:
    engine = tiny("gemma3").engine(f"staged+{codec}", prefix_caching=False)
    run(engine, [tokens(120, 4)], greedy(70), each_step=engine.check_integrity)
    for event in events[1:]:
        for (track, head), before in event.before.items():
            if track:
                assert torch.equal(event.after[track, head][: len(before)], before)
    held = sum(len(rows) for (_, head), rows in events[-1].after.items() if head >= 2)
    assert held == 2 * (120 + 64)  # the second layer has no window


@pytest.mark.parametrize("prompt", [2, 20, 150])
@pytest.mark.parametrize(
    "codec",
    [
        "kivi(bits=4,recent=16,group=8)",
        "int8(recent=16)",
        "think(keep=0.99,recent=16)",
        "decoquant(bits=8,recent=16)",
        "zipcache(hi=8,lo=4,recent=16,every=32)",
    ],
)
def test_what_is_generated_after_a_short_prompt_is_stored_as_well_as_after_a_long_one(
    tiny: GetTiny, monkeypatch: pytest.MonkeyPatch, codec: str, prompt: int
) -> None:
    """The relative error of all coded rows, about what the widths promise."""
    errors: list[float] = []
    settle = Staging.settle

    def watched(self: Staging, pool: PagePool, tables: StagedTables) -> None:
        raw, had = HeldRows(pool, tables), tables.rows.copy()
        sources = [[side[h][raw.track[i, h] == 0] for side in raw.rows(i)] for i in range(2) for h in range(2)]
        settle(self, pool, tables)
        held = HeldRows(pool, tables)
        for head, old in enumerate(sources):
            i, h = divmod(head, 2)
            for track in range(1, tables.layout.tracks):
                where = ((held.track[i, h] == track) & held.valid[i, h]).nonzero()[int(had[track, head]) :, 0]
                for side, own in zip(held.rows(i), old, strict=True):
                    for row in side[h][where]:  # from the uncompressed row that is nearest
                        errors.append(float((own - row).norm(dim=-1).min() / own.norm(dim=-1).mean()))

    monkeypatch.setattr(Staging, "settle", watched)
    run(tiny("llama").engine(f"staged+{codec}", prefix_caching=False), [tokens(prompt, 4)], greedy(220))
    assert len(errors) > 100  # zipcache waits for 128 tokens to fit its scales to
    assert sum(errors) / len(errors) < 0.1
