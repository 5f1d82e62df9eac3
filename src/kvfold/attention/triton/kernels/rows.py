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
def raw_rows(numbers, base, ok, side, D: tl.constexpr, BYTES: tl.constexpr):
    """Numbers [N, D] of blocks of one token. numbers: the pool as such numbers."""
    d = tl.arange(0, D)
    at = (base + tl.load(side)) // BYTES
    some = ok[:, None] & (d < tl.load(side + 2))[None, :]
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
def _word(words, halves, at, some, BITS: tl.constexpr, INDEX: tl.constexpr):
    """Bits from 32 INDEX on of the streams that begin at byte `at`, 2 BITS bytes each, uint32."""
    if BITS % 2 == 0:
        return tl.load(words + at // 4 + INDEX, mask=some, other=0).to(tl.uint32, bitcast=True)
    word = tl.load(halves + at // 2 + 2 * INDEX, mask=some, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    if 2 * INDEX + 1 < BITS:
        high = tl.load(halves + at // 2 + 2 * INDEX + 1, mask=some, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        word = word | (high << 16)
    return word


@triton.jit
def _code(w0, w1, w2, w3, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    """Code J of each stream as 2 * code + 1 - 2^BITS, twice its distance from the middle: exact in DTYPE."""
    FIRST: tl.constexpr = (J * BITS) // 32
    OFF: tl.constexpr = (J * BITS) % 32
    MASK: tl.constexpr = 2**BITS - 1
    word = w0 if FIRST == 0 else (w1 if FIRST == 1 else (w2 if FIRST == 2 else w3))
    if OFF + BITS > 32:
        following = w1 if FIRST == 0 else (w2 if FIRST == 1 else w3)
        word = (word >> OFF) | (following << (32 - OFF))
    elif DTYPE == tl.float16 and OFF > 1:
        word = word >> (OFF - 1)
    elif DTYPE != tl.float16 and OFF > 0:
        word = word >> OFF
    if DTYPE == tl.float16:
        # In the mantissa of a number between 1024 and 2047 an integer is a float16 at once, without a conversion.
        if OFF + BITS > 32 or OFF == 0:
            word = word << 1
        bits = (word & (2 * MASK)) | 0x6401
        return bits.to(tl.uint16).to(tl.float16, bitcast=True) - (1025.0 + MASK)
    return (2 * (word & MASK).to(tl.int32) - MASK).to(DTYPE)


@triton.jit
def _two(w0, w1, w2, w3, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_code(w0, w1, w2, w3, BITS, J, DTYPE), _code(w0, w1, w2, w3, BITS, J + BY, DTYPE))


@triton.jit
def _four(w0, w1, w2, w3, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_two(w0, w1, w2, w3, BITS, J, 2 * BY, DTYPE), _two(w0, w1, w2, w3, BITS, J + BY, 2 * BY, DTYPE))


@triton.jit
def _eight(w0, w1, w2, w3, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    return tl.join(_four(w0, w1, w2, w3, BITS, J, 2 * BY, DTYPE), _four(w0, w1, w2, w3, BITS, J + BY, 2 * BY, DTYPE))


@triton.jit
def plane_rows(
    words, halves, base, token, ok, side, D: tl.constexpr, BITS: tl.constexpr, FULL: tl.constexpr, DTYPE: tl.constexpr
):
    """Static codes of one width, twice their distance from the middle of the range, [16 U, D] in DTYPE.

    base, token, ok: of the first rows of units, [U]. A thread reads the whole stream of a dimension (2 BITS bytes)
    once and takes its 16 codes from registers. Dropped dimensions are 0 (FULL: there are none); rows that are not
    there are any codes.
    """
    d = tl.arange(0, D)
    at = (base + tl.load(side) + (token // 16) * tl.load(side + 1))[:, None] + (2 * BITS) * d[None, :]
    some = ok[:, None] & (d < tl.load(side + 2))[None, :]
    w0 = _word(words, halves, at, some, BITS, 0)
    w1 = w0
    w2 = w0
    w3 = w0
    if BITS > 2:
        w1 = _word(words, halves, at, some, BITS, 1)
    if BITS > 4:
        w2 = _word(words, halves, at, some, BITS, 2)
    if BITS > 6:
        w3 = _word(words, halves, at, some, BITS, 3)
    codes = tl.join(_eight(w0, w1, w2, w3, BITS, 0, 2, DTYPE), _eight(w0, w1, w2, w3, BITS, 1, 2, DTYPE))
    codes = tl.reshape(codes, [base.shape[0], D, 16])
    if not FULL:
        codes = tl.where(some[:, :, None], codes, 0.0).to(DTYPE)
    return tl.reshape(tl.permute(codes, (0, 2, 1)), [base.shape[0] * 16, D])
