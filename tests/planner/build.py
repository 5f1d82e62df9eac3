"""Profiles with known costs, over layouts of real methods, for simulations whose outcome is known."""

from kvfold.benchmark.trace import TraceRequest
from kvfold.kv.layout import CacheLayout
from kvfold.methods.base import CacheShape
from kvfold.methods.registry import build_method
from kvfold.planner.document import EngineLimits, Machine, MethodProfile, Profile
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost

SHAPE = CacheShape(2, 4, 2, 16, (None, None), None, 16, (None, None))
MACHINE = Machine("a test", 1, "wall", "0", "0")
FREE = TransferCost(0.0, 1e18)
LATENCY = LatencyModel(PrefillCost(0.01, 1e-4, 1e-8), DecodeCost(0.005, 1e-9, 1e-3))


def layout_of(method: str) -> CacheLayout:
    layout = build_method(method).prepare(SHAPE, None).layout
    assert isinstance(layout, CacheLayout)
    return layout


def method_profile(
    method: str = "none", latency: LatencyModel = LATENCY, transfer: TransferCost = FREE
) -> MethodProfile:
    return MethodProfile(method, latency, transfer, layout_of(method), None)


def profile(*methods: MethodProfile, limits: EngineLimits | None = None, positions: int = 100_000) -> Profile:
    return Profile(1, "a-model", "float32", "float32", "auto", positions, MACHINE, limits or EngineLimits(), methods)


def requests(*sizes: tuple[float, int, int]) -> list[TraceRequest]:
    return [TraceRequest(*size) for size in sizes]
