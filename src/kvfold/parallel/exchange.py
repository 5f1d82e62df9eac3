"""How the ranks of a prompt meet: rows lent, heads for sequence (Ulysses), or sealed rows going round (ring).

Ulysses: Jacobs et al., arXiv 2309.14509. Ring: Liu et al., arXiv 2310.01889. What travels is projected, as in ZeroC v1
(arXiv 2408.04107), and what is stored travels as it is stored.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from kvfold.parallel.far import Blocks, HeadFormats, Partial, attend_far
from kvfold.parallel.numbers import as_bytes, from_bytes
from kvfold.parallel.setting import CODES, NEAR, QUERIES, Setting
from kvfold.parallel.shard import FarShard
from kvfold.parallel.split import Positions, Split
from kvfold.parallel.wire import Wire


def borrow(setting: Setting, split: Split, wire: Wire, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Positions]:
    """All rows that this rank's queries see near: k, v float32 [n, G, d] and their positions, ascending.

    k, v: this rank's own rows, as near pages give them back.
    """
    own = split.positions[wire.rank]
    lent = [split.lent(wire.rank, target) for target in range(wire.ranks)]
    rows = torch.stack([k, v], 1).to(setting.near_dtype)
    messages = [{NEAR: as_bytes(rows[torch.from_numpy(np.searchsorted(own, each))])} for each in lent]
    sources = [split.lent(source, wire.rank) for source in range(wire.ranks)]
    found = wire.swap(messages, [{NEAR: len(each) * setting.near_bytes} for each in sources])
    shape = (-1, 2, setting.layout.kv_heads, setting.dim)
    others = [from_bytes(each[NEAR], setting.near_dtype).view(shape) for each in found]
    positions = np.concatenate([own, *sources])
    order = np.argsort(positions)
    every = torch.cat([rows, *others])[torch.from_numpy(order)].float()
    return every[:, 0], every[:, 1], positions[order]


def ulysses(
    setting: Setting, split: Split, wire: Wire, layer: int, q: Tensor, blocks: Blocks, shard: FarShard, scale: float
) -> Partial:
    """Sends queries and sealed rows to the ranks of their heads, and gets outputs back. Fills the shard.

    q: [T, H, d] of all own queries; blocks: own units of all heads. Returns attention of the asking queries.
    """
    rank, ranks = wire.rank, range(wire.ranks)
    asking = split.asking
    queries = q[len(q) - asking[rank] :]
    every = setting.formats(layer, tuple(range(setting.layout.kv_heads)))
    messages, sizes = [], []
    mine = split.heads[rank]
    for other in ranks:
        heads = split.heads[other]
        theirs = setting.formats(layer, heads)
        chosen = theirs.pack(_of_heads(every, blocks, theirs))
        packed = setting.queries(layer, heads).pack(queries[:, setting.query_heads(heads)])
        messages.append({QUERIES: packed, CODES: chosen})
        units = sum(map(len, split.units(other)))
        sizes.append(
            {
                QUERIES: setting.queries(layer, mine).nbytes(asking[other]),
                CODES: setting.formats(layer, mine).nbytes(units),
            }
        )
    found = wire.swap(messages, sizes)
    formats = setting.formats(layer, mine)
    order = sorted(ranks, key=lambda r: split.spans[r][:1])  # ascending positions; who has none sends nothing
    pieces = [formats.unpack(found[other][CODES]) for other in order]
    whole = [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]
    shard.write(formats, 0, whole)
    answers = []
    for other in ranks:
        asked = setting.queries(layer, mine).unpack(found[other][QUERIES], asking[other])
        where = split.positions[other][len(split.positions[other]) - asking[other] :]
        answers.append(setting.answer(layer, mine, attend_far(formats, asked * scale, where, whole, shard.units)))
    back = wire.swap(answers, [setting.answer_sizes(layer, split.heads[o], asking[rank]) for o in ranks])
    result = Partial.empty(asking[rank], q.shape[1], q.shape[2])
    for other in ranks:
        heads = split.heads[other]
        result.add(setting.read_answer(layer, heads, asking[rank], back[other]), heads=setting.query_heads(heads))
    return result


def ring(
    setting: Setting, split: Split, wire: Wire, layer: int, q: Tensor, blocks: Blocks, shard: FarShard, scale: float
) -> Partial:
    """Sealed rows go round, from each rank to the one below it and only as far as somebody sees them; the next are on
    their way while the present ones are attended. Arguments and result as in `ulysses`."""
    rank, ranks = wire.rank, wire.ranks
    formats = setting.formats(layer, split.heads[rank])
    shard.write(formats, 0, blocks)
    asking = split.asking[rank]
    queries = q[len(q) - asking :].float() * scale
    positions = split.positions[rank][len(q) - asking :]
    result = Partial.empty(asking, q.shape[1], q.shape[2])
    window = setting.layout.windows[layer]
    reach = cache(lambda origin: hops(split, origin, window))
    names = [str(piece) for piece in range(2)]
    first = 0
    held: dict[str, Tensor] = {}
    for name, units in zip(names, split.units(rank), strict=False):
        last = first + len(units)
        own = [
            _unit_slice(setting, fmt.block, x, first, last) for (fmt, _), x in zip(formats.groups, blocks, strict=True)
        ]
        held[name] = formats.pack(own)
        first = last
    for hop in range(ranks):
        origin, coming = (rank + hop) % ranks, (rank + hop + 1) % ranks
        sizes = {
            name: formats.nbytes(len(units))
            for name, units, far in zip(names, split.units(coming), reach(coming), strict=False)
            if far > hop
        }
        send = {n: held[n] for n, far in zip(names, reach(origin), strict=False) if far > hop}
        last_hop = hop == ranks - 1
        wait = wire.pass_on(
            [] if last_hop else [((rank - 1) % ranks, {CODES: _whole(send)})],
            [] if last_hop else [((rank + 1) % ranks, sizes)],
        )
        if hop == 0:
            result.add(attend_far(formats, queries, positions, blocks, shard.units))
        else:
            for name, units in zip(names, split.units(origin), strict=False):
                if name in held and split.sees(rank, units, window):
                    numbers = np.arange(units.first, units.last)
                    result.add(attend_far(formats, queries, positions, formats.unpack(held[name]), numbers))
        held = wait()[0] if not last_hop else {}
    return result


def hops(split: Split, origin: int, window: int | None) -> list[int]:
    """How far round each piece of a rank has to go: to the furthest rank that sees something of it."""
    ranks = split.ranks
    return [
        max([(origin - other) % ranks for other in range(ranks) if split.sees(other, units, window)], default=0)
        for units in split.units(origin)
    ]


def _whole(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts.values()])


def _unit_slice(setting: Setting, block: int, blocks: Tensor, first: int, last: int) -> Tensor:
    per_unit = setting.layout.seal // block
    return blocks[:, first * per_unit : last * per_unit]


def _of_heads(every: HeadFormats, blocks: Blocks, some: HeadFormats) -> Blocks:
    """The blocks of some heads, grouped as their own `HeadFormats` does."""
    by_format = {fmt: (places.tolist(), own) for (fmt, places), own in zip(every.groups, blocks, strict=True)}
    chosen = []
    for fmt, _ in some.groups:
        places, own = by_format[fmt]
        chosen.append(own[[i for i, place in enumerate(places) if every.heads[place] in some.heads]])
    return chosen
