"""Blocks of bytes in and out of the pool's pages."""

import torch
from torch import Tensor

from kvfold.kv.format import PageFormat
from kvfold.kv.packing import decode, encode


def _blocks(data: Tensor, fmt: PageFormat) -> Tensor:
    """The pool as blocks of this format, a view uint8 [n_pages, blocks, block_bytes]."""
    view: Tensor = data[:, : fmt.blocks * fmt.block_bytes].unflatten(1, (fmt.blocks, fmt.block_bytes))
    return view


def read_blocks(data: Tensor, fmt: PageFormat, pages: Tensor) -> Tensor:
    """All blocks of the pages int64 [N, P] (NO_PAGE reads any page: mask it), uint8 [N, P * blocks, block_bytes]."""
    n, p = pages.shape
    flat = _blocks(data, fmt).index_select(0, pages.clamp(min=0).reshape(-1))
    return flat.view(n, p * fmt.blocks, fmt.block_bytes)


def write_blocks(data: Tensor, fmt: PageFormat, pages: Tensor, index: Tensor, blocks: Tensor) -> None:
    """Writes blocks uint8 [..., block_bytes] to block `index` of `pages`, both int64 [...]."""
    _blocks(data, fmt)[pages.reshape(-1), index.reshape(-1)] = blocks.reshape(-1, fmt.block_bytes)


def round_trip(fmt: PageFormat, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., head_dim] as they read back from near pages of format `fmt` (one token per block), float32."""
    blocks = encode(fmt, key.unsqueeze(-2), value.unsqueeze(-2)).reshape(1, -1, fmt.block_bytes)
    rows = decode(fmt, blocks)
    return rows[0][0].T.reshape(key.shape), rows[1][0].T.reshape(value.shape)


def all_pages(tables: list[Tensor]) -> Tensor:
    """Page tables of several sequences side by side, padded with NO_PAGE to the longest, int64 [N, heads, columns]."""
    columns = max(t.shape[-1] for t in tables)
    return torch.stack([torch.nn.functional.pad(t, (0, columns - t.shape[-1]), value=-1) for t in tables]).long()
