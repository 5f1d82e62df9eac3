"""What is planned for a method is what a sequence then holds: budgets of bytes are compared on that."""

from collections.abc import Callable

import pytest

from kvfold.engine.sizing import held_bytes
from kvfold.kv.pool import PagePool
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import ENTRY_BYTES
from kvfold.methods.staging import Staging
from tests.engine.tiny import Tiny, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
CONTEXT = 400
EQUAL = [
    "staged",
    "snapkv(budget=100)",
    "expected(budget=0.3)",
    "h2o(budget=100)",
    "ems(budget=101)",
    'batchmax(policy="snapkv",budget=100,chunk=80)',
    "staged+zeroc(bits=3,recent=32)",
    "staged+zeroc(bits=2,salient_bits=4,salient=0.25,recent=32)",
    "staged+kivi(bits=2,recent=32,group=16)",
    "staged+think",
    "staged+decoquant",
    "staged+zipcache(recent=32)",
    "staged+hack",
    "tova(budget=200)+int4(recent=16)",
]
UNEQUAL = ["adakv(budget=100)", "kvcompress(budget=100)", "pyramidkv(budget=100)", "adakv(budget=0.4)+int8(recent=16)"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every sequence after each event."""
    seen: list[int] = []
    settle = Staging.settle

    def watched(self: Staging, pool: PagePool, tables: StagedTables) -> None:
        settle(self, pool, tables)
        seen.append(tables.nbytes)

    monkeypatch.setattr(Staging, "settle", watched)
    return seen


@pytest.mark.parametrize("method", EQUAL + UNEQUAL)
def test_what_is_planned_is_what_is_held(tiny: GetTiny, held: list[int], method: str) -> None:
    engine = tiny("llama").engine(method, prefix_caching=False)
    [output] = run(engine, [tokens(CONTEXT, 1)], greedy(1))
    assert output.finished
    lane = engine.lanes[0]
    layout, planned = lane.layout, held_bytes(lane, CONTEXT)
    # Every track's last page, and tokens that wait until there are enough to be coded.
    ends = layout.tracks + -(-max(layout.block, layout.enough) // layout.raw.capacity)
    slack = layout.heads * ends * (layout.page_bytes + ENTRY_BYTES)
    uneven = method in UNEQUAL
    assert planned - (2 if uneven else 1) * slack <= held[-1] <= planned + (slack if uneven else 0)
