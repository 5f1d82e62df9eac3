"""Rows of sealed pages, as tiles in registers."""

# mypy: ignore-errors
import triton
import triton.language as tl

RAW = tl.constexpr(0)
PLANES = tl.constexpr(1)
TOKEN = tl.constexpr(1)
CHANNEL = tl.constexpr(2)
STEP = tl.constexpr(3)


@triton.jit
def float_of_bits(bits):
    """bfloat16 numbers, given as their 16 bits in int32, in float32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def bfloat_bits(x):
    """The bits of float32 numbers rounded to bfloat16, half to even, in the low half of int32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded & 0xFFFF, 0x7FC0)


@triton.jit
def locate(rows, ok, table, pages, page_bytes):
    """Where rows are: byte offset of the block in the pool int64, token in the block, whether it is there at all.

    table: the page ids of a head; pages: its descriptor.
    """
    capacity = tl.load(pages)
    block = tl.load(pages + 1)
    block_bytes = tl.load(pages + 2)
    page = tl.load(table + rows // capacity, mask=ok, other=-1)
    ok = ok & (page >= 0)
    token = rows % capacity
    base = tl.where(ok, page, 0).to(tl.int64) * page_bytes + (token // block) * block_bytes
    return base, token % block, ok


@triton.jit
def share_of_far(start, count, window, sinks, recent, seal, split, splits, N: tl.constexpr):
    """What one of `splits` programs reads for the query at position `start`: sealed rows there are, the first that it
    sees, and the tiles of N rows [low, high)."""
    far = tl.where(count > 0, tl.maximum(start + 1 - sinks - recent, 0) // seal * seal, 0)
    visible = tl.maximum(start - window + 1 - sinks, 0)
    low = visible // N
    each = tl.cdiv(tl.cdiv(far, N) - low, splits)
    low = low + split * each
    return far, visible, low, tl.minimum(tl.cdiv(far, N), low + each)


@triton.jit
def raw_rows(numbers, base, ok, side, D: tl.constexpr, BYTES: tl.constexpr, FULL: tl.constexpr):
    """Numbers [N, D] of blocks of one token. numbers: the pool as such numbers. FULL: no dimension of the block is
    dropped, so that rows begin at multiples of 16 bytes."""
    d = tl.arange(0, D)
    at = (base + tl.load(side)) // BYTES
    some = ok[:, None]
    if FULL:
        at = tl.multiple_of(at, 16 // BYTES)
    else:
        some = some & (d < tl.load(side + 2))[None, :]
    return tl.load(numbers + at[:, None] + d[None, :], mask=some, other=0.0)


@triton.jit
def _half(pool, at, some):
    """float16 numbers at any byte, in float32."""
    low = tl.load(pool + at, mask=some, other=0).to(tl.int32)
    high = tl.load(pool + at + 1, mask=some, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def gathered_rows(
    pool, base, token, ok, side, dims, block, steps, D: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr
):
    """Rows [N, D] in float32, each dimension with a width of its own. base, token, ok: of `locate`, [N]."""
    d = tl.arange(0, D)
    offset = tl.load(dims + 2 * d)[None, :]
    width = tl.load(dims + 2 * d + 1)[None, :]
    kept = tl.load(side + 2)
    unit = base + tl.load(side) + (token // UNIT) * tl.load(side + 1)
    bit = (token % UNIT)[:, None] * width
    at = unit[:, None] + offset + (bit >> 3)
    shift = bit & 7
    some = ok[:, None] & (width > 0)
    low = tl.load(pool + at, mask=some, other=0).to(tl.int32)
    high = tl.load(pool + at + 1, mask=some & (shift + width > 8), other=0).to(tl.int32)
    both = low | (high << 8)
    code = ((both >> shift) & ((1 << width) - 1)).to(tl.float32)
    if SCALE == TOKEN or SCALE == CHANNEL:
        scales = base + tl.load(side + 3)
        count = tl.load(side + 4)
        if SCALE == TOKEN:
            which = (d // tl.load(side + 5))[None, :] * block + token[:, None]
        else:
            which = d[None, :] + 0 * token[:, None]
        start = scales[:, None] + 2 * which
        some = ok[:, None] & (d < kept)[None, :]
        return code * _half(pool, start + 2 * count, some) + _half(pool, start, some)
    centred = code - ((1 << width) - 1).to(tl.float32) * 0.5
    if SCALE == STEP:
        byte = tl.load(pool + base + tl.load(side + 3) + token, mask=ok, other=0).to(tl.int32)
        return centred * tl.load(steps + byte)[:, None]
    return tl.where(width == 16, float_of_bits(both), centred)


@triton.jit
def _pair(halves, at, some, BITS: tl.constexpr, INDEX: tl.constexpr):
    """Bits from 32 INDEX on of the streams that begin at byte `at`, 2 BITS bytes each, from 16-bit loads, uint32."""
    word = tl.load(halves + at // 2 + 2 * INDEX, mask=some, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    if 2 * INDEX + 1 < BITS:
        high = tl.load(halves + at // 2 + 2 * INDEX + 1, mask=some, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        word = word | (high << 16)
    return word


@triton.jit
def pairs(halves, at, some, BITS: tl.constexpr):
    """Four uint32 of streams that begin at bytes `at`, of which the first 2 BITS bytes count, from 16-bit loads."""
    w0 = _pair(halves, at, some, BITS, 0)
    w1 = w0
    w2 = w0
    w3 = w0
    if BITS > 2:
        w1 = _pair(halves, at, some, BITS, 1)
    if BITS > 4:
        w2 = _pair(halves, at, some, BITS, 2)
    if BITS > 6:
        w3 = _pair(halves, at, some, BITS, 3)
    return w0, w1, w2, w3


@triton.jit
def stream(words, halves, longs, base, token, ok, side, D: tl.constexpr, BITS: tl.constexpr):
    """The words of units: four uint32 [U, D], of which the first 2 BITS bytes count.

    base, token, ok: of the first rows of units, [U]. Units that are not there are any codes, as are dropped dimensions.
    """
    d = tl.arange(0, D)
    at = (base + tl.load(side) + (token // 16) * tl.load(side + 1))[:, None]
    some = ok[:, None] & (d < tl.load(side + 2))[None, :]
    if BITS == 4:  # contiguous, so that threads load 16 bytes
        both = tl.load(longs + at // 8 + d[None, :], mask=some, other=0).to(tl.uint64, bitcast=True)
        w0 = both.to(tl.uint32)
        w1 = (both >> 32).to(tl.uint32)
        return w0, w1, w0, w0
    elif BITS == 2:
        w0 = tl.load(words + at // 4 + d[None, :], mask=some, other=0).to(tl.uint32, bitcast=True)
        return w0, w0, w0, w0
    elif BITS % 2 == 0:
        starts = words + at // 4 + (BITS // 2) * d[None, :]
        w0 = tl.load(starts, mask=some, other=0).to(tl.uint32, bitcast=True)
        w1 = tl.load(starts + 1, mask=some, other=0).to(tl.uint32, bitcast=True)
        w2 = tl.load(starts + 2, mask=some, other=0).to(tl.uint32, bitcast=True)
        w3 = w2
        if BITS == 8:
            w3 = tl.load(starts + 3, mask=some, other=0).to(tl.uint32, bitcast=True)
        return w0, w1, w2, w3
    else:
        return pairs(halves, at + (2 * BITS) * d[None, :], some, BITS)


@triton.jit
def plane(words, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    """Code J of each unit and dimension, exact in DTYPE: (2 * code + 1 - 2^BITS) * `plane_scale`.

    That is twice its distance from the middle. In float16 it is left where it is found: in the mantissa of a number
    between 1024 and 2047 an integer is a float16 at once, without a conversion, and several planes share one shift.
    """
    PER: tl.constexpr = 9 // BITS if BITS < 5 else 1  # codes that fit into bits 1 to 9
    AT: tl.constexpr = 1 + J % PER * BITS if DTYPE == tl.float16 else 0  # where the code is to be found
    START: tl.constexpr = J * BITS - AT
    FIRST: tl.constexpr = START // 32 if START >= 0 else 0
    OFF: tl.constexpr = START - 32 * FIRST
    MASK: tl.constexpr = (2**BITS - 1) << AT
    word = words[FIRST]
    if OFF < 0:
        word = word << -OFF
    elif OFF + AT + BITS > 32:
        word = (word >> OFF) | (words[FIRST + 1] << (32 - OFF))
    elif OFF > 0:
        word = word >> OFF
    if DTYPE == tl.float16:
        bits = (word & MASK) | (0x6400 | (1 << (AT - 1)))
        return bits.to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + (1 << (BITS + AT - 1)))
    else:
        return (2 * (word & MASK).to(tl.int32) - MASK).to(DTYPE)


@triton.jit
def plane_scale(BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    """What `plane` has multiplied code J by, a power of 2."""
    PER: tl.constexpr = 9 // BITS if BITS < 5 else 1
    return float(2 ** (J % PER * BITS)) if DTYPE == tl.float16 else 1.0


@triton.jit
def _one(words, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    return (plane(words, BITS, J, DTYPE) * (1.0 / plane_scale(BITS, J, DTYPE))).to(DTYPE)


@triton.jit
def _two(words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_one(words, BITS, J, DTYPE), _one(words, BITS, J + BY, DTYPE))


@triton.jit
def _four(words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_two(words, BITS, J, 2 * BY, DTYPE), _two(words, BITS, J + BY, 2 * BY, DTYPE))


@triton.jit
def _eight(words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_four(words, BITS, J, 2 * BY, DTYPE), _four(words, BITS, J + BY, 2 * BY, DTYPE))


@triton.jit
def plane_rows(
    words, halves, longs, base, token, ok, side, D: tl.constexpr, BITS: tl.constexpr, FULL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Static codes of one width, twice their distance from the middle of the range, [16 U, D] in DTYPE.

    base, token, ok: of the first rows of units, [U]. Dropped dimensions are 0 (FULL: there are none); rows that are not
    there are any codes.
    """
    taken = stream(words, halves, longs, base, token, ok, side, D, BITS)
    codes = tl.join(_eight(taken, BITS, 0, 2, DTYPE), _eight(taken, BITS, 1, 2, DTYPE))
    codes = tl.reshape(codes, [base.shape[0], D, 16])
    if not FULL:
        kept = tl.arange(0, D) < tl.load(side + 2)
        codes = tl.where(kept[None, :, None], codes, 0.0).to(DTYPE)
    return tl.reshape(tl.permute(codes, (0, 2, 1)), [base.shape[0] * 16, D])
