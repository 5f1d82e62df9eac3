"""Decode attention over static codes of mixed widths: planes of codes as in `planes`, 16 dimensions at once.

The dimensions of one width are a field of the row. Fields are worked off in chunks of 16 dimensions, as many as one
step of a matrix instruction takes: every width has its own code, compiled for it, and how many chunks there are is
read from the head's descriptor. So heads may differ as they like. Weighted sums cannot stay in registers that are
chosen at run time; they gather in the program's own rows of the output, which stay in the cache.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from kvfold.attention.triton.kernels.planes import REACH
from kvfold.attention.triton.kernels.rows import float_of_bits, locate, pairs, plane, plane_scale, share_of_far

QUERY_REACH = tl.constexpr(2.0**10)  # what queries of at most 1 are multiplied by, for the same reason


@triton.jit
def _chunk(halves, at, some, BITS: tl.constexpr):
    """What `_plane` takes: the words of codes, or, for numbers, where they are."""
    if BITS == 16:
        return at, some
    else:
        return pairs(halves, at, some, BITS)


@triton.jit
def _plane(halves, chunk, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    """Token J of every unit, [U, 16]."""
    if BITS == 16:
        bits = tl.load(halves + chunk[0] // 2 + J, mask=chunk[1], other=0).to(tl.int32)
        return tl.clamp(float_of_bits(bits), -65504.0, 65504.0).to(DTYPE)
    else:
        return plane(chunk, BITS, J, DTYPE)


@triton.jit
def _scale(BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    """What `_plane` has multiplied twice the rows by."""
    return 0.5 if BITS == 16 else plane_scale(BITS, J, DTYPE)


@triton.jit
def _score(q, s, halves, chunk, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    q = (q * (QUERY_REACH / _scale(BITS, J, DTYPE))).to(DTYPE)
    return tl.dot(q, tl.trans(_plane(halves, chunk, BITS, J, DTYPE)), s, input_precision="ieee")


@triton.jit
def _weighed(w, halves, chunk, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The sum over tokens of 16 dimensions, [M, 16]. w: 16 planes of weights [M, U]."""
    PER: tl.constexpr = 9 // BITS if BITS < 5 and DTYPE == tl.float16 else 1  # different scales of planes
    acc = tl.zeros([w[0].shape[0], 16], tl.float32)
    for K in tl.static_range(PER):
        part = tl.zeros([w[0].shape[0], 16], tl.float32)
        for J in tl.static_range(K, 16, PER):
            part = tl.dot(w[J], _plane(halves, chunk, BITS, J, DTYPE), part, input_precision="ieee")
        acc += part * (1.0 / _scale(BITS, K, DTYPE))
    return acc


@triton.jit
def _four(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _sixteen(s):
    """[M, U, 16] of 16 planes [M, U]."""
    even = tl.join(_four(s[0], s[4], s[8], s[12]), _four(s[2], s[6], s[10], s[14]))
    odd = tl.join(_four(s[1], s[5], s[9], s[13]), _four(s[3], s[7], s[11], s[15]))
    return tl.reshape(tl.join(even, odd), [s[0].shape[0], s[0].shape[1], 16])


@triton.jit
def _apart4(p):
    """Planes 0, 1, 2 and 3 of [M, U, 2, 2]."""
    even, odd = tl.split(p)
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def _apart(p):
    """The inverse of `_sixteen`."""
    even, odd = tl.split(tl.reshape(p, [p.shape[0], p.shape[1], 2, 2, 2, 2]))
    e0, e1 = tl.split(even)  # 0, 4, 8, 12 and 2, 6, 10, 14
    o0, o1 = tl.split(odd)
    p0, p4, p8, p12 = _apart4(e0)
    p2, p6, p10, p14 = _apart4(e1)
    p1, p5, p9, p13 = _apart4(o0)
    p3, p7, p11, p15 = _apart4(o1)
    return p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15


@triton.jit(do_not_specialize=["tokens", "far_stride_n", "window", "splits"])
def decode_fields(
    q_ptr,  # [T, H, D]
    q_strides_t,
    q_strides_h,
    out_ptr,  # float32 [splits, T, H, HEAD_DIM], 0 where rows have no dimension
    lse_ptr,  # float32 [splits, T, H]
    tokens,  # T
    n_heads,  # H
    halves,  # the pool as int16
    page_bytes,
    pages_ptr,  # descriptors of the layer's first head
    sides_ptr,
    fields_ptr,
    sequences_ptr,  # int32 [N, 4]: start, count, first row of the batch
    far_ptr,  # int32 [N, heads, columns], at the layer's first head
    far_stride_n,
    far_stride_h,
    heads_ptr,  # int32, KV heads of this launch
    scale,
    window,
    sinks,
    recent,
    seal,
    splits,  # programs that share the sealed rows of one sequence and head
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # padded
    M: tl.constexpr,
    N: tl.constexpr,  # tokens at once, a multiple of 256
    WIDTHS: tl.constexpr,  # widths that occur in a layout, bit b of the number for b bits
    DTYPE: tl.constexpr,  # of the products
):
    """Grid: (sequences, heads of the launch, splits). One query per sequence."""
    UNITS: tl.constexpr = N // 16
    sequence = tl.program_id(0)
    head = tl.load(heads_ptr + tl.program_id(1))
    split = tl.program_id(2)
    start = tl.load(sequences_ptr + 4 * sequence)
    count = tl.load(sequences_ptr + 4 * sequence + 1)
    row = tl.load(sequences_ptr + 4 * sequence + 2).to(tl.int64)
    pages = pages_ptr + 4 * head
    side = sides_ptr + 16 * head
    fields = fields_ptr + 2 * 17 * 4 * head
    table = far_ptr + sequence.to(tl.int64) * far_stride_n + head * far_stride_h

    m = tl.arange(0, M)
    i = tl.arange(0, 16)
    d = tl.arange(0, D)
    live = m < GROUP * tl.minimum(count, 1)
    q_head = head * GROUP + m
    q_at = q_ptr + (row * q_strides_t + q_head * q_strides_h)[:, None]
    q = tl.load(q_at + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32) * scale
    size = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    out_at = split.to(tl.int64) * tokens * n_heads + row * n_heads + q_head

    far, visible, low, high = share_of_far(start, count, window, sinks, recent, seal, split, splits, N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in range(low, high):
        firsts = tile * N + 16 * tl.arange(0, UNITS)
        base, token, there = locate(firsts, firsts < far, table, pages, page_bytes)
        unit = base + tl.load(side) + (token // 16) * tl.load(side + 1)
        zero = tl.zeros([M, UNITS], tl.float32)
        s = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        for BITS in tl.static_range(1, 17):
            if (WIDTHS >> BITS) & 1:
                first = tl.load(fields + 4 * BITS)
                stop = tl.load(fields + 4 * BITS + 1)
                offset = tl.load(fields + 4 * BITS + 2)
                for begin in range(first, stop, 16):
                    dim = begin + i
                    at = unit[:, None] + (offset + 2 * BITS * (dim - first))[None, :]
                    chunk = _chunk(halves, at, there[:, None] & (dim < stop)[None, :], BITS)
                    some = live[:, None] & (dim < stop)[None, :]
                    part = tl.load(q_at + dim[None, :], mask=some, other=0.0).to(tl.float32)
                    part = part * scale / size[:, None]
                    s = (
                        _score(part, s[0], halves, chunk, BITS, 0, DTYPE),
                        _score(part, s[1], halves, chunk, BITS, 1, DTYPE),
                        _score(part, s[2], halves, chunk, BITS, 2, DTYPE),
                        _score(part, s[3], halves, chunk, BITS, 3, DTYPE),
                        _score(part, s[4], halves, chunk, BITS, 4, DTYPE),
                        _score(part, s[5], halves, chunk, BITS, 5, DTYPE),
                        _score(part, s[6], halves, chunk, BITS, 6, DTYPE),
                        _score(part, s[7], halves, chunk, BITS, 7, DTYPE),
                        _score(part, s[8], halves, chunk, BITS, 8, DTYPE),
                        _score(part, s[9], halves, chunk, BITS, 9, DTYPE),
                        _score(part, s[10], halves, chunk, BITS, 10, DTYPE),
                        _score(part, s[11], halves, chunk, BITS, 11, DTYPE),
                        _score(part, s[12], halves, chunk, BITS, 12, DTYPE),
                        _score(part, s[13], halves, chunk, BITS, 13, DTYPE),
                        _score(part, s[14], halves, chunk, BITS, 14, DTYPE),
                        _score(part, s[15], halves, chunk, BITS, 15, DTYPE),
                    )
        scores = _sixteen(s) * (0.5 / QUERY_REACH) * size[:, None, None]
        rows = firsts[:, None] + tl.arange(0, 16)[None, :]
        seen = (rows >= visible) & (rows < far) & there[:, None]
        scores = tl.where(seen[None, :, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(tl.max(scores, 2), 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(scores - safe[:, None, None])
        alpha = tl.exp(top - safe)
        total = total * alpha + tl.sum(tl.sum(p, 2), 1)
        top = new
        # The last tile divides by the sum of all weights.
        share = tl.where(tile == high - 1, 0.5 / tl.maximum(total, 1e-38), 1.0)
        w = _apart((p * REACH).to(DTYPE))
        unit = base + tl.load(side + 8) + (token // 16) * tl.load(side + 9)
        for BITS in tl.static_range(1, 17):
            if (WIDTHS >> BITS) & 1:
                first = tl.load(fields + 4 * (17 + BITS))
                stop = tl.load(fields + 4 * (17 + BITS) + 1)
                offset = tl.load(fields + 4 * (17 + BITS) + 2)
                for begin in range(first, stop, 16):
                    dim = begin + i
                    at = unit[:, None] + (offset + 2 * BITS * (dim - first))[None, :]
                    chunk = _chunk(halves, at, there[:, None] & (dim < stop)[None, :], BITS)
                    acc = _weighed(w, halves, chunk, BITS, DTYPE)
                    some = live[:, None] & (dim < stop)[None, :]
                    to = out_ptr + out_at[:, None] * HEAD_DIM + dim[None, :]
                    before = tl.load(to, mask=some & (tile + 0 * dim > low)[None, :], other=0.0)
                    tl.store(to, (before * alpha[:, None] + acc * (1.0 / REACH)) * share[:, None], mask=some)

    lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-38)), float("-inf"))
    tl.store(lse_ptr + out_at, lse, mask=live)
