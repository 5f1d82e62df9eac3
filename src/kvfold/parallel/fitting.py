"""Which methods and settings can be spread over ranks."""

from kvfold.engine.lane import MethodLane
from kvfold.kv.layout import CacheLayout
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.numbers import LEAST_BITS, MOST_BITS


def positional_layout(lane: MethodLane) -> CacheLayout:
    """The layout of a method that can be spread over ranks. Raises ParallelError for others."""
    if not isinstance(lane.layout, CacheLayout):
        raise ParallelError(staged_message(lane.label))
    return lane.layout


def staged_message(label: str) -> str:
    """Why a method cannot be spread over ranks, and which can."""
    return (
        f"{label} compresses by what the whole prompt's queries and rows are like, which no rank sees; for sequence "
        "parallelism use none, int8, int4, kivi, hack, zeroc, or streaming with one of them"
    )


def check_wire_bits(bits: int) -> None:
    """Raises ParallelError for bits that numbers cannot have on the wire."""
    if bits != 16 and not LEAST_BITS <= bits <= MOST_BITS:
        raise ParallelError(
            f"wire_bits={bits} is out of range; choose 16 (as the cache keeps them) or {LEAST_BITS} to {MOST_BITS}"
        )
