"""Steps in which torch serves some sequences and the kernels the others."""

import pytest
import torch

from kvfold.attention.base import SequenceStep
from kvfold.attention.cpu.sealed import CpuSealedPlan
from kvfold.attention.divided import DividedPlan
from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.format import PageFormat, Row, Scale, Segment, raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.tables import PageTables
from tests.attention.stepping import random_inputs, stepped
from tests.attention.test_cpu import backend

DIM = 32
NEAR = raw_format(160 * DIM, DIM)
CODES = Row((Segment(4, DIM),), Scale.TOKEN)
DENSE = CacheLayout(((NEAR,) * 2,) * 2, NEAR, 0, 0, (None, 40), exact=True)
CODED = CacheLayout(((PageFormat(160 * DIM, DIM, 16, CODES, CODES),) * 2,), NEAR, 3, 20, (None,))


@pytest.mark.parametrize("kernels", ["portable", "avx2"])
@pytest.mark.parametrize("layout", [DENSE, CODED], ids=["dense", "coded"])
def test_both_parts_are_those_of_one_backend(kernels: str, layout: CacheLayout) -> None:
    cuts = [[1, 150, 1, 30], [150, 1, 2, 1], [5, 5, 5, 170], [160, 130]]
    inputs = random_inputs([sum(c) for c in cuts], len(layout.windows), 4, 2, DIM, 0, torch.bfloat16)
    found, expected = (stepped(b, layout, inputs, cuts, 0.2) for b in (backend(kernels), ReferenceBackend()))
    for one, other in zip(found, expected, strict=True):
        for (out, lse), (out_r, lse_r) in zip(one, other, strict=True):
            torch.testing.assert_close(out, out_r, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, lse_r, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kernels", "divided"), [("portable", True), ("avx512-vnni", False)])
def test_a_prompt_beside_decoding_divides_a_step_without_avx512(kernels: str, divided: bool) -> None:
    pool = PagePool(200, DENSE.page_bytes)
    steps, first = [], 0
    for count in (1, 100, 1):
        tables = PageTables(DENSE)
        tables.reserve(pool, count)
        steps.append(SequenceStep(tables, first, count))
        first += count
    plan = backend(kernels).plan(pool, DENSE, steps, 1.0)
    assert isinstance(plan, DividedPlan if divided else CpuSealedPlan)
