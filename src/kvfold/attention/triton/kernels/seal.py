"""New rows into pages: what leaves the window as codes, byte for byte as `kv.packing.encode` writes them, what stays
near as numbers."""

# mypy: ignore-errors
import triton
import triton.language as tl

from kvfold.attention.triton.kernels.attend import sealed
from kvfold.attention.triton.kernels.rows import CHANNEL, RAW, STEP, TOKEN, bfloat_bits, float_of_bits

STEPS_PER_OCTAVE = tl.constexpr(12)


@triton.jit
def _rounded(x, BYTES: tl.constexpr):
    """Float32 rows as near pages give them back."""
    if BYTES == 2:
        return float_of_bits(bfloat_bits(x))
    else:
        return x


@triton.jit
def _stored(x, BYTES: tl.constexpr):
    """The same as what is stored: int16 bits of bfloat16, or float32."""
    if BYTES == 2:
        return bfloat_bits(x).to(tl.int16)
    else:
        return x


@triton.jit
def _half_bits(x):
    """float32 to float16 and back; the bits in int32."""
    half = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    return half.to(tl.float32), half.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _store_half(pool, at, bits, some):
    tl.store(pool + at, (bits & 255).to(tl.uint8), mask=some)
    tl.store(pool + at + 1, ((bits >> 8) & 255).to(tl.uint8), mask=some)


@triton.jit
def _row_values(
    new, stride_t, near, table, position, ok, start, first, sinks, ring, capacity, page_bytes, side_index,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Rows [16, D] at some positions, float32: from near slots, or, from `start` on, the new ones of this head."""
    d = tl.arange(0, D)
    fresh = ok & (position >= start)
    at = new + (first + position - start).to(tl.int64)[:, None] * stride_t + d[None, :]
    rows = tl.load(at, mask=fresh[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    old = ok & (position < start)
    slot = tl.where(position < sinks, position, sinks + (position - sinks) % ring)
    page = tl.load(table + slot // capacity, mask=old, other=-1)
    base = tl.where(old, page, 0).to(tl.int64) * page_bytes + slot % capacity * (2 * HEAD_DIM * BYTES)
    at = near + (base // BYTES + side_index * HEAD_DIM)[:, None] + d[None, :]
    held = tl.load(at, mask=old[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    return tl.where(old[:, None], held, _rounded(rows, BYTES))


@triton.jit
def _token_scaled(pool, x, top, base, token, block, scales, count, group, kept, ok, D: tl.constexpr):
    """Codes (not rounded) of rows [16, D] with a scale per token and group of dimensions, which are stored."""
    d = tl.arange(0, D)
    codes = x
    for g in range(0, tl.cdiv(kept, group)):
        mine = ((d // group == g) & (d < kept))[None, :]
        least = tl.min(tl.where(mine, x, float("inf")), 1)
        most = tl.max(tl.where(mine, x, float("-inf")), 1)
        levels = tl.max(tl.where(mine, top, 0.0), 1)
        low, low_bits = _half_bits(least)
        step, step_bits = _half_bits(tl.math.div_rn(most - least, levels))
        codes = tl.where(mine, tl.math.div_rn(x - low[:, None], tl.maximum(step, 1e-12)[:, None]), codes)
        at = base + scales + 2 * (g * block + token)
        _store_half(pool, at, low_bits, ok)
        _store_half(pool, at + 2 * count, step_bits, ok)
    return codes


@triton.jit
def _step_scaled(pool, x, top, base, token, scales, steps, width, ok):
    """Codes of rows with one logarithmic step per token, whose byte is stored."""
    step = tl.max(tl.where(width > 0, tl.math.div_rn(2 * tl.abs(x), tl.maximum(top, 1.0)), 0.0), 1)
    step = tl.maximum(step, 1e-30)
    byte = tl.minimum(tl.maximum(tl.ceil(tl.log2(step) * STEPS_PER_OCTAVE), -128), 127).to(tl.int32) + 128
    tl.store(pool + base + scales + token, byte.to(tl.uint8), mask=ok)
    return tl.math.div_rn(x, tl.load(steps + byte)[:, None]) + top * 0.5


@triton.jit
def _store_codes(pool, x, codes, top, base, token, start, unit_bytes, offset, width, ok, UNIT: tl.constexpr):
    """Rounds codes [16, D] and stores them as bits, and as bfloat16 what is 16 bits wide."""
    codes = tl.where(codes == codes, codes, 0.0)
    codes = tl.minimum(tl.maximum(codes, 0.0), top)
    codes = (codes + 8388608.0) - 8388608.0  # beyond 2^23 floats are integers: rounds half to even
    codes = codes.to(tl.int32)
    at = base + start + (token // UNIT) * unit_bytes
    raw = ok[:, None] & (width == 16)
    bits = bfloat_bits(x)
    where = at[:, None] + offset + 2 * (token % UNIT)[:, None]
    tl.store(pool + where, (bits & 255).to(tl.uint8), mask=raw)
    tl.store(pool + where + 1, ((bits >> 8) & 255).to(tl.uint8), mask=raw)
    coded = (width > 0) & (width <= 8)
    if UNIT == 1:  # a code is a byte
        tl.store(pool + at[:, None] + offset, codes.to(tl.uint8), mask=ok[:, None] & coded)
    else:  # all 16 rows are of one unit and lie together
        first = tl.min(at, 0)
        size = 2 * width * tl.min(ok.to(tl.int32), 0)  # bytes of each dimension
        bit = tl.arange(0, 16)[:, None] * width
        for byte in tl.static_range(16):
            shift = bit - 8 * byte
            left = codes << tl.minimum(tl.maximum(shift, 0), 8)
            part = tl.where(shift >= 0, left, codes >> tl.minimum(tl.maximum(-shift, 0), 8)) & 255
            joined = tl.sum(tl.where(coded, part, 0), 0)[None, :]
            tl.store(pool + first + offset + byte, joined.to(tl.uint8), mask=coded & (size > byte))


@triton.jit(do_not_specialize=["near_stride_n", "far_stride_n", "side_index"])
def seal(
    new_ptr,  # keys or values [T, G, D] of the batch
    stride_t,
    stride_h,
    pool,
    near_numbers,
    far_words,  # the pool as int16, or float32 where far pages hold such numbers
    page_bytes,
    pages_ptr,
    sides_ptr,
    dims_ptr,
    steps,
    sequences_ptr,
    near_ptr,
    near_stride_n,
    near_stride_h,
    far_ptr,
    far_stride_n,
    far_stride_h,
    heads_ptr,
    sinks,
    recent,
    seal_tokens,
    ring,
    near_capacity,
    side_index,  # 0: keys, 1: values
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    NEAR_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Seals one side of the tokens that leave the window in this step.

    Grid: (sequences, blocks, heads of the launch); where a block is one token, a program seals 16 of them.
    """
    PER: tl.constexpr = 16 if BLOCK == 1 else BLOCK
    UNIT: tl.constexpr = 1 if BLOCK == 1 else 16
    sequence = tl.program_id(0)
    head = tl.load(heads_ptr + tl.program_id(2))
    start = tl.load(sequences_ptr + 4 * sequence)
    count = tl.load(sequences_ptr + 4 * sequence + 1)
    first = tl.load(sequences_ptr + 4 * sequence + 2)
    before = sealed(start, sinks, recent, seal_tokens, EXACT) - sinks
    after = sealed(start + count, sinks, recent, seal_tokens, EXACT) - sinks
    begin = before + tl.program_id(1) * PER
    if begin < after:
        pages = pages_ptr + 4 * head
        side = sides_ptr + 16 * head + 8 * side_index
        dims = dims_ptr + 4 * D * head + 2 * D * side_index
        capacity = tl.load(pages)
        block_bytes = tl.load(pages + 2)
        near_table = near_ptr + sequence.to(tl.int64) * near_stride_n + head * near_stride_h
        table = far_ptr + sequence.to(tl.int64) * far_stride_n + head * far_stride_h
        d = tl.arange(0, D)
        offset = tl.load(dims + 2 * d)[None, :]
        width = tl.load(dims + 2 * d + 1)[None, :]
        kept = tl.load(side + 2)
        scales = tl.load(side + 3)
        scale_count = tl.load(side + 4)
        top = tl.where(width <= 8, (1 << width) - 1, 0).to(tl.float32)
        source = new_ptr + head * stride_h
        n = tl.arange(0, 16)
        low = tl.full([D], float("inf"), tl.float32)
        high = tl.full([D], float("-inf"), tl.float32)
        if SCALE == CHANNEL:
            for unit in range(0, PER // 16):
                rows = begin + unit * 16 + n
                x = _row_values(
                    source, stride_t, near_numbers, near_table, rows + sinks, rows < after, start, first, sinks, ring,
                    near_capacity, page_bytes, side_index, HEAD_DIM, D, NEAR_BYTES,
                )  # fmt: skip
                low = tl.minimum(low, tl.min(x, 0))
                high = tl.maximum(high, tl.max(x, 0))
        for unit in range(0, PER // 16):
            rows = begin + unit * 16 + n
            ok = rows < after
            x = _row_values(
                source, stride_t, near_numbers, near_table, rows + sinks, ok, start, first, sinks, ring,
                near_capacity, page_bytes, side_index, HEAD_DIM, D, NEAR_BYTES,
            )  # fmt: skip
            page = tl.load(table + rows // capacity, mask=ok, other=-1)
            ok = ok & (page >= 0)
            base = tl.where(ok, page, 0).to(tl.int64) * page_bytes
            base += (rows % capacity) // BLOCK * block_bytes
            token = (rows % capacity) % BLOCK
            if KIND == RAW:
                at = far_words + ((base + tl.load(side)) // (BITS // 8))[:, None] + d[None, :]
                tl.store(at, _stored(x, BITS // 8), mask=ok[:, None] & (d < kept)[None, :])
            else:
                if SCALE == TOKEN:
                    group = tl.load(side + 5)
                    codes = _token_scaled(pool, x, top, base, token, BLOCK, scales, scale_count, group, kept, ok, D)
                elif SCALE == STEP:
                    codes = _step_scaled(pool, x, top, base, token, scales, steps, width, ok)
                elif SCALE == CHANNEL:
                    rounded, low_bits = _half_bits(low)
                    step, step_bits = _half_bits(tl.math.div_rn(high - low, tl.maximum(tl.max(top, 0), 1.0)))
                    codes = tl.math.div_rn(x - rounded[None, :], tl.maximum(step, 1e-12)[None, :])
                    at = tl.min(base, 0) + scales + 2 * d
                    _store_half(pool, at, low_bits, d < kept)
                    _store_half(pool, at + 2 * scale_count, step_bits, d < kept)
                else:
                    codes = x + top * 0.5
                unit_bytes = tl.load(side + 1)
                _store_codes(pool, x, codes, top, base, token, tl.load(side), unit_bytes, offset, width, ok, UNIT)


@triton.jit(do_not_specialize=["near_stride_n"])
def keep(
    k_ptr,
    v_ptr,
    k_strides_t,
    k_strides_h,
    v_strides_t,
    v_strides_h,
    near_words,  # the pool as int16, or as float32
    page_bytes,
    sequences_ptr,
    near_ptr,
    near_stride_n,
    near_stride_h,
    sinks,
    recent,
    seal_tokens,
    ring,
    near_capacity,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    NEAR_BYTES: tl.constexpr,
):
    """Puts the new tokens that stay near into their slots. Grid: (sequences, tiles of 16 new tokens, KV heads)."""
    sequence = tl.program_id(0)
    head = tl.program_id(2)
    start = tl.load(sequences_ptr + 4 * sequence)
    count = tl.load(sequences_ptr + 4 * sequence + 1)
    first = tl.load(sequences_ptr + 4 * sequence + 2)
    new = tl.program_id(1) * 16 + tl.arange(0, 16)
    d = tl.arange(0, D)
    position = start + new
    stays = (position < sinks) | (position >= sealed(start + count, sinks, recent, seal_tokens, False))
    ok = (new < count) & stays
    slot = tl.where(position < sinks, position, sinks + (position - sinks) % ring)
    table = near_ptr + sequence.to(tl.int64) * near_stride_n + head * near_stride_h
    page = tl.load(table + slot // near_capacity, mask=ok, other=-1)
    ok = ok & (page >= 0)
    base = tl.where(ok, page, 0).to(tl.int64) * page_bytes + slot % near_capacity * (2 * HEAD_DIM * NEAR_BYTES)
    at = near_words + (base // NEAR_BYTES)[:, None] + d[None, :]
    some = ok[:, None] & (d < HEAD_DIM)[None, :]
    row = (first + new).to(tl.int64)[:, None]
    k = tl.load(k_ptr + row * k_strides_t + head * k_strides_h + d[None, :], mask=some, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_strides_t + head * v_strides_h + d[None, :], mask=some, other=0.0).to(tl.float32)
    tl.store(at, _stored(k, NEAR_BYTES), mask=some)
    tl.store(at + HEAD_DIM, _stored(v, NEAR_BYTES), mask=some)
