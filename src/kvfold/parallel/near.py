"""Attention to the rows that a query sees in 16 bits: the sinks, and the recent ones up to itself."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.attention.products import Stored, merged
from kvfold.kv.layout import CacheLayout
from kvfold.parallel.far import Partial

TILE = 256  # queries of one range looked at together: their rows are a band along the diagonal


def attend_near(
    layout: CacheLayout,
    layer: int,
    q: Tensor,
    positions: NDArray[np.int64],
    k: Tensor,
    v: Tensor,
    rows: NDArray[np.int64],
) -> Partial:
    """q: float32 [T, H, d] scaled, at ascending positions [T]; k, v: float32 [n, G, d] as near pages give them back, at
    ascending positions `rows` [n], which hold all that these queries see near."""
    count, heads, dim = q.shape
    found = Partial.empty(count, heads, dim)
    if layout.exact or not count:
        return found
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for begin, end in zip([0, *breaks], [*breaks, count], strict=True):
        for first in range(int(begin), int(end), TILE):
            part = slice(first, min(first + TILE, int(end)))
            own = torch.from_numpy(positions[part])
            low = max(layout.sinks, layout.sealed(int(positions[first]) + 1))
            band = (rows < layout.sinks) | ((rows >= low) & (rows <= int(own[-1])))
            which = torch.from_numpy(np.flatnonzero(band))
            seen = torch.from_numpy(rows[band])
            mask = layout.seen_near(own, seen, layout.windows[layer], layout.keeps_sinks(layer))[None, None]
            keys, values = (x[which].permute(1, 2, 0)[None] for x in (k, v))
            grouped = q[part].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)[None]
            result = merged(grouped, [Stored.plain(keys, values, mask)])
            found.out[part] = result.out[0].permute(2, 0, 1, 3).flatten(1, 2)
            found.lse[part] = result.lse[0].permute(2, 0, 1).flatten(1, 2)
    return found
