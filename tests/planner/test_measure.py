"""What a profile times: whole periods of what decoding sequences do every so many tokens."""

from pathlib import Path

import pytest
import torch

from kvfold.config.progress import SILENT
from kvfold.kv.layout import CacheLayout
from kvfold.model.loading import LoadedModel, load_model
from kvfold.planner.document import EngineLimits
from kvfold.planner.grid import FULL, QUICK, Case, Grid, fit_grid
from kvfold.planner.measure import Bench

from .test_same_schedule import make_engine

LIMITS = EngineLimits(64, 512, 8, prefix_caching=False)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


@pytest.mark.parametrize("method", ["kivi(bits=2,recent=16,group=16)", "kivi(bits=2,recent=32,group=32)"])
def test_sealing_has_its_share_of_the_mean(model: LoadedModel, method: str) -> None:
    """A clock that counts sealed tokens: one of every sequence and step, wherever the contexts end in a block."""
    engine = make_engine(model, method, LIMITS, 2**24)
    layout = engine.lanes[0].layout
    assert isinstance(layout, CacheLayout)

    def clock() -> float:
        return float(sum(layout.sealed(s.computed) for s in engine.scheduler.running))

    bench, contexts = Bench(engine, 300, clock), (64, 70, 90, 95)
    bench.prepare(0, contexts, SILENT)
    steps = Grid((), 1, 4, 32).spanning(bench.period(0))
    assert steps == layout.seal
    for case in (Case(batch=batch, context=context) for batch in (1, 3) for context in contexts):
        [(work, mean)] = bench.run(0, case, steps)
        assert mean == work.batch == case.batch
    bench.release()


def test_steps_span_periods_that_are_not_too_long(model: LoadedModel) -> None:
    assert [FULL.spanning(period) for period in (1, 3, 16, 32, 64, 100)] == [8, 9, 16, 32, 64, 8]
    assert [QUICK.spanning(period) for period in (1, 16, 32, 64)] == [4, 16, 32, 4]
    for method, period in (("none", 1), ("kivi(bits=2)", 32), ("h2o(budget=40)", 32)):
        assert Bench(make_engine(model, method, LIMITS, 2**22), 300).period(0) == period


@pytest.mark.parametrize("positions", [100, 300, 2048])
def test_a_short_model_has_room_for_all_steps(positions: int) -> None:
    fitted = fit_grid(FULL, positions)
    assert all(case.context + fitted.most_steps + 4 < positions for case in fitted.cases)
