"""What N workers would send and gain for one prompt: the rows of `kvfold parallel`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvfold.config.progress import SILENT, Progress
from kvfold.errors import ConfigError
from kvfold.kv.layout import CacheLayout
from kvfold.model.spec import ModelSpec
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.fitting import check_wire_bits, positional_layout
from kvfold.parallel.loading import Loaded, ParallelConfig, load
from kvfold.parallel.setting import CODES, NEAR, Setting
from kvfold.parallel.split import VARIANTS, Split, Variant
from kvfold.parallel.traffic import (
    Network,
    prefill_bytes,
    prefill_flops,
    prefill_seconds,
    rounds,
    uncompressed_bytes,
)


@dataclass(frozen=True)
class Estimate:
    """One arrangement. bytes: of all workers together; share: of uncompressed rows of the same exchange, with this
    model's KV heads; share_mha: with as many KV heads as query heads, each as the method keeps it here."""

    workers: int
    variant: Variant
    wire_bits: int
    bytes: int
    share: float
    share_mha: float
    seconds: float
    seconds_uncompressed: float
    seconds_alone: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    config: ParallelConfig,
    tokens: int,
    workers: Sequence[int],
    wire_bits: Sequence[int],
    *,
    gigabits: float,
    microseconds: float,
    teraflops: float,
    progress: Progress = SILENT,
) -> list[Estimate]:
    """All arrangements that are possible, exactly for bytes and by the model of `traffic` for seconds.

    Raises ConfigError or ParallelError for what is out of range, and what `load` raises.
    """
    for name, value in (("--gigabits", gigabits), ("--teraflops", teraflops)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value} is out of range; give a number above 0")
    if not 0 <= microseconds < float("inf"):
        raise ConfigError(f"--latency {microseconds} is out of range; give microseconds, 0 or more")
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens} is no prompt; give 1 or more")
    for count in workers:
        if count < 2:
            raise ParallelError(f"--workers {count} exchange nothing; give 2 or more")
    for bits in wire_bits:
        check_wire_bits(bits)
    loaded = load(config, progress)
    network = Network(gigabits * 1e9, microseconds * 1e-6)
    layout, spec = positional_layout(loaded.lane), loaded.model.spec
    rows = []
    for count in workers:
        for variant in VARIANTS:
            found: list[Estimate] = []
            if variant == "ulysses" and spec.kv_heads < count:
                continue
            split = Split.of(layout, variant, count, tokens)
            for bits in wire_bits:
                row = _row(_setting(loaded, layout, bits), split, spec, bits, network, teraflops * 1e12)
                # A ring of codes sends no numbers but the lent rows: nothing for fewer bits to change.
                if not any(row.bytes == other.bytes for other in found):
                    found.append(row)
            rows += found
    return rows


def _setting(loaded: Loaded, layout: CacheLayout, bits: int) -> Setting:
    return Setting(layout, loaded.model.spec.heads // loaded.model.spec.kv_heads, bits)


def _row(setting: Setting, split: Split, spec: ModelSpec, bits: int, network: Network, flops: float) -> Estimate:
    variant, count = split.variant, split.ranks
    sent = [sum(each.values()) for each in prefill_bytes(setting, split)]
    shape = (variant, count, split.length, spec.n_layers, spec.heads)
    dense = uncompressed_bytes(*shape, spec.kv_heads, spec.head_dim)
    dense_mha = uncompressed_bytes(*shape, spec.heads, spec.head_dim)
    alone = prefill_flops(spec, split.length) / flops
    waits = rounds(variant, count, spec.n_layers)
    most = network.seconds(max(sent), waits)
    plain = network.seconds(dense / count, waits)
    return Estimate(
        count,
        variant,
        bits,
        sum(sent),
        sum(sent) / dense,
        _with_mha(setting, split) / dense_mha,
        prefill_seconds(variant, alone / count, most),
        prefill_seconds(variant, alone / count, plain),
        alone,
    )


def _with_mha(setting: Setting, split: Split) -> int:
    """Bytes if every query head had keys and values of its own: rows times g, queries and outputs as they are."""
    total = 0
    for each in prefill_bytes(setting, split):
        for kind, size in each.items():
            total += size * (setting.group if kind in (NEAR, CODES) else 1)
    return total
