"""Bytes that sequence-parallel prefill sends, by arithmetic, and the seconds that a network makes of them."""

from collections import Counter
from dataclasses import dataclass

from kvfold.model.spec import ModelSpec
from kvfold.parallel.exchange import hops
from kvfold.parallel.setting import CODES, LSE, NEAR, OUTPUTS, QUERIES, Setting
from kvfold.parallel.split import Split, Variant


def prefill_bytes(setting: Setting, split: Split) -> list[Counter[str]]:
    """What each rank sends while a prompt is read, by kind: exactly what `Wire` counts."""
    layout, ranks = setting.layout, range(split.ranks)
    sent: list[Counter[str]] = [Counter() for _ in ranks]
    lent = [sum(len(split.lent(rank, other)) for other in ranks if other != rank) for rank in ranks]
    units = [[len(each) for each in split.units(rank)] for rank in ranks]
    reach = {window: [hops(split, rank, window) for rank in ranks] for window in set(layout.windows)}
    for layer, window in enumerate(layout.windows):
        for rank in ranks:
            sent[rank][NEAR] += lent[rank] * setting.near_bytes
            others = [other for other in ranks if other != rank]
            if split.variant == "ring":
                size = setting.formats(layer, split.heads[rank]).nbytes
                for hop in range(split.ranks - 1):
                    origin = (rank + hop) % split.ranks
                    pieces = zip(units[origin], reach[window][origin], strict=True)
                    sent[rank][CODES] += sum(size(count) for count, far in pieces if far > hop)
                continue
            own = split.heads[rank]
            for other in others:
                heads = split.heads[other]
                sent[rank][QUERIES] += setting.queries(layer, heads).nbytes(split.asking[rank])
                sent[rank][CODES] += setting.formats(layer, heads).nbytes(sum(units[rank]))
                sent[rank].update(setting.answer_sizes(layer, own, split.asking[other]))
    assert all(kind in (NEAR, QUERIES, CODES, OUTPUTS, LSE) for each in sent for kind in each)
    return sent


def uncompressed_bytes(
    variant: Variant, ranks: int, tokens: int, layers: int, heads: int, kv_heads: int, dim: int, element: int = 2
) -> int:
    """All ranks together, 16-bit rows of d dimensions. With multi-head attention kv_heads is heads.

    Ulysses: queries, keys, values and outputs, each rank keeping 1 / N of its own. Ring: keys and values of every rank
    go to all others.
    """
    row = layers * dim * element
    if variant == "ring":
        return (ranks - 1) * tokens * 2 * kv_heads * row
    return (ranks - 1) * tokens * (2 * heads + 2 * kv_heads) * row // ranks


@dataclass(frozen=True)
class Network:
    """A link of each worker, full duplex. bandwidth: bits per second; latency: seconds per message."""

    bandwidth: float
    latency: float

    def seconds(self, most_bytes: float, rounds: int) -> float:
        """most_bytes: of the worker that sends most; rounds: messages that wait for each other."""
        return most_bytes * 8 / self.bandwidth + rounds * self.latency


def rounds(variant: Variant, ranks: int, layers: int) -> int:
    """Messages of a prompt that wait for each other: rows lent, then two all-to-alls or N - 1 hops, in every layer."""
    return 0 if ranks == 1 else layers * (1 + (ranks - 1 if variant == "ring" else 2))


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """Multiplications and additions of a prompt: 2 per weight and token, and causal attention."""
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    mlp = (3 if spec.gated_mlp else 2) * spec.hidden * spec.intermediate
    weights = spec.hidden * dim * (2 * heads + 2 * kv_heads) + mlp
    pairs = sum(_pairs(tokens, layer.window) for layer in spec.layer_specs)
    return 2.0 * weights * spec.n_layers * tokens + 4.0 * heads * dim * pairs


def _pairs(tokens: int, window: int | None) -> float:
    """Queries and the keys that they see."""
    seen = tokens if window is None else min(window, tokens)
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


def prefill_seconds(variant: Variant, compute: float, wire: float) -> float:
    """A ring computes while the next rows come; all-to-alls are waited for. compute: of one worker, its share."""
    return max(compute, wire) if variant == "ring" else compute + wire
