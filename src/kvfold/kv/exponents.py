"""Floating point numbers in fewer bytes, bit for bit: exponents take four bits instead of eight.

Numbers that attention sees have exponents within a few powers of two of each other. Each is stored as its distance
from the largest one, 15 standing for "further", and those follow whole. Sign and mantissa are noise and stay as they
are. So bfloat16 takes three quarters of its bytes, without tables and at the speed of memory, nearly what a Huffman
code of the exponents reaches (DFloat11, arXiv 2504.11651: 0.70).
"""

import struct

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_HEAD = struct.Struct("<IB")  # how many exponents follow whole, the largest exponent
_PLAIN = 2**32 - 1  # in the place of the count: the numbers follow as they are
_FURTHER = 15
MOST_MORE = _HEAD.size  # bytes by which packed numbers may be longer than they were


def packed_size(size: int, width: int) -> int:
    """Bytes of packed numbers of which no exponent is further than 14 from the largest one."""
    count = size // width
    return _HEAD.size + size - count + -(-count // 2)


def pack(data: Bytes, width: int) -> Bytes:
    """bfloat16 (width 2) or float32 (4) numbers as uint8 [n * width], to what `unpack` reads."""
    words = data.view(np.uint16).reshape(-1, width // 2)
    high = words[:, -1]  # sign, exponent, 7 bits of the mantissa
    exponents = (high >> 7).astype(np.uint8)
    largest = exponents.max(initial=0)
    distances = np.minimum(largest - exponents, _FURTHER)
    whole = exponents[distances == _FURTHER]
    if packed_size(len(data), width) + len(whole) >= len(data):
        return np.concatenate([_head(_PLAIN, 0), data])
    pairs = np.append(distances, np.uint8(0)) if len(distances) % 2 else distances
    rest = (high & 0x7F).astype(np.uint8) | (high >> 8 & 0x80).astype(np.uint8)
    low = np.ascontiguousarray(words[:, :-1]).view(np.uint8).ravel()
    return np.concatenate([_head(len(whole), largest), pairs[0::2] | pairs[1::2] << 4, rest, low, whole])


def unpack(data: Bytes, size: int, width: int) -> tuple[Bytes, int]:
    """The `size` bytes that were packed, and how many bytes of `data` they took. Raises ValueError where `data` is not
    what `pack` makes of so many."""
    if len(data) < _HEAD.size:
        raise ValueError("packed numbers begin with their head")
    further, largest = _HEAD.unpack(data[: _HEAD.size].tobytes())
    count = size // width
    end = _HEAD.size + size if further == _PLAIN else packed_size(size, width) + further
    if end > len(data):
        raise ValueError(f"{len(data)} bytes of packed numbers that take {end}")
    body = data[_HEAD.size : end]
    if further == _PLAIN:
        return body, end
    pairs, rest, low, whole = np.split(body, np.cumsum([-(-count // 2), count, size - 2 * count]))
    distances = np.stack([pairs & 15, pairs >> 4], 1).ravel()[:count]
    exponents = largest - distances
    far = distances == _FURTHER
    if np.count_nonzero(far) != further:
        raise ValueError(f"{further} whole exponents where others are missing")
    exponents[far] = whole
    words = np.empty((count, width // 2), np.uint16)
    words[:, :-1] = low.copy().view(np.uint16).reshape(count, -1)
    high = exponents.astype(np.uint16) << 7
    high |= rest & 0x7F
    high |= (rest & 0x80).astype(np.uint16) << 8
    words[:, -1] = high
    return words.view(np.uint8).ravel(), end


def _head(further: int, largest: int) -> Bytes:
    return np.frombuffer(_HEAD.pack(further, largest), np.uint8)
