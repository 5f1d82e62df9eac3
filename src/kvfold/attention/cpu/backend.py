"""The backend `cpu`: plans that hand whole layers to the compiled kernels."""

from collections.abc import Sequence
from typing import Any

from kvfold.attention.base import Plan, SequenceStep
from kvfold.attention.cpu.sealed import CpuSealedPlan, SealedFormats
from kvfold.attention.cpu.staged import CpuStagedPlan, StagedFormats
from kvfold.attention.divided import DividedPlan
from kvfold.attention.reference import ReferenceBackend
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import PagePool
from kvfold.kv.staged import StagedLayout
from kvfold.native.library import find_kernels, kernels_name

# New tokens of a sequence that torch's fused kernel serves faster than kernels without AVX-512; where codes are sealed
# and read back, torch takes more time for those.
MANY, MANY_CODED = 64, 128

Layout = CacheLayout | StagedLayout
Formats = SealedFormats | StagedFormats | None


class CpuBackend:
    """Implements `AttentionBackend` with the kernels for this machine's instructions.

    kernels: name of the instructions to be used (`avx512-vnni-bf16`, `avx512-vnni`, `avx2`, `portable`); None: the best
    there are. What the kernels do not know (units of odd sizes) goes to the reference, and so do long pieces of prompts
    where the kernels have no AVX-512, if both then compute the same.
    Raises KernelsUnavailable where the kernels were not built or the machine lacks the instructions.
    """

    def __init__(self, kernels: str | None = None) -> None:
        self._kernels = find_kernels(kernels)
        self._reference = ReferenceBackend()
        self._wide = self.name.startswith("avx512")
        self._formats: dict[int, tuple[Layout, Formats]] = {}  # by identity: hashing would take longer

    @property
    def name(self) -> str:
        """The instructions in use."""
        return kernels_name(self._kernels)

    def plan(self, pool: PagePool, layout: Layout, steps: Sequence[SequenceStep[Any]], scale: float) -> Plan:
        formats = self._formats_of(layout) if pool.data.device.type == "cpu" else None
        if formats is None:
            return self._reference.plan(pool, layout, steps, scale)
        if not self._wide and not formats.rounded_by_reference:
            many = MANY_CODED if isinstance(layout, CacheLayout) and not layout.exact else MANY
            pieces = [step for step in steps if step.count > many]
            if len(pieces) == len(steps):
                return self._reference.plan(pool, layout, steps, scale)
            if pieces:
                others = [step for step in steps if step.count <= many]
                return DividedPlan(pool, layout, ((self._reference, pieces), (self, others)), scale)
        if isinstance(layout, StagedLayout) and isinstance(formats, StagedFormats):
            return CpuStagedPlan(pool, layout, formats, steps, scale, self._kernels)
        assert isinstance(layout, CacheLayout)
        assert isinstance(formats, SealedFormats)
        return CpuSealedPlan(pool, layout, formats, steps, scale, self._kernels)

    def _formats_of(self, layout: Layout) -> Formats:
        if id(layout) not in self._formats:
            made = StagedFormats.of(layout) if isinstance(layout, StagedLayout) else SealedFormats.of(layout)
            self._formats[id(layout)] = layout, made
        return self._formats[id(layout)][1]
