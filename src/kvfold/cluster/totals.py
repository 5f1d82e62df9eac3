"""What a cluster's workers do, as if they were one engine."""

from collections.abc import Sequence
from dataclasses import fields

from kvfold.cluster.members import Member
from kvfold.engine.stats import EngineStats, LaneStats


def total(members: Sequence[Member], methods: Sequence[str]) -> EngineStats:
    """The sum of what the workers said last, and each one's own figures. methods: of the lanes."""
    reports = [m.report.stats for m in members if m.report is not None]
    names = [f.name for f in fields(EngineStats) if f.name not in ("page_bytes", "lanes", "workers")]
    totals = {name: sum(getattr(report, name) for report in reports) for name in names}
    lanes = []
    for number, kv in enumerate(methods):
        own = [report.lanes[number] for report in reports]
        sums = (sum(getattr(lane, name) for lane in own) for name in ("bytes", "dense_bytes", "running", "waiting"))
        lanes.append(LaneStats(kv, *sums))
    page_bytes = reports[0].page_bytes if reports else 0
    return EngineStats(**totals, page_bytes=page_bytes, lanes=lanes, workers=[m.stats() for m in members])
