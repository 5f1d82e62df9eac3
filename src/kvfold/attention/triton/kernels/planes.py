"""Decode attention over static codes of one width: the codes go from their words straight into matrix operands.

Code j of every unit of 16 tokens is a *plane*, one matrix product each: columns are units, not tokens. So a thread that
has read a dimension's word uses all of its codes itself, and no code ever passes through shared memory. Scores of
different planes are joined for the softmax and split again, in registers, for the products with the values.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from kvfold.attention.triton.kernels.rows import locate, plane, plane_scale, share_of_far, stream

REACH = tl.constexpr(2.0**13)  # weights are at most 1 and float16 is finest far above the smallest number


@triton.jit
def _scores(q, words, BITS: tl.constexpr, J: tl.constexpr):
    scores = tl.dot(q, tl.trans(plane(words, BITS, J, q.dtype)), input_precision="ieee")
    return scores * (1.0 / plane_scale(BITS, J, q.dtype))


@triton.jit
def _scores2(q, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr):
    return tl.join(_scores(q, words, BITS, J), _scores(q, words, BITS, J + BY))


@triton.jit
def _scores4(q, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr):
    return tl.join(_scores2(q, words, BITS, J, 2 * BY), _scores2(q, words, BITS, J + BY, 2 * BY))


@triton.jit
def _scores8(q, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr):
    return tl.join(_scores4(q, words, BITS, J, 2 * BY), _scores4(q, words, BITS, J + BY, 2 * BY))


@triton.jit
def _weighted(acc, p, words, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr):
    weights = (p * (REACH / plane_scale(BITS, J, DTYPE))).to(DTYPE)
    return tl.dot(weights, plane(words, BITS, J, DTYPE), acc, input_precision="ieee")


@triton.jit
def _weighted2(acc, p, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    even, odd = tl.split(p)
    return _weighted(_weighted(acc, even, words, BITS, J, DTYPE), odd, words, BITS, J + BY, DTYPE)


@triton.jit
def _weighted4(acc, p, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    even, odd = tl.split(p)
    return _weighted2(_weighted2(acc, even, words, BITS, J, 2 * BY, DTYPE), odd, words, BITS, J + BY, 2 * BY, DTYPE)


@triton.jit
def _weighted8(acc, p, words, BITS: tl.constexpr, J: tl.constexpr, BY: tl.constexpr, DTYPE: tl.constexpr):
    even, odd = tl.split(p)
    return _weighted4(_weighted4(acc, even, words, BITS, J, 2 * BY, DTYPE), odd, words, BITS, J + BY, 2 * BY, DTYPE)


@triton.jit(do_not_specialize=["tokens", "far_stride_n", "window", "splits"])
def decode_planes(
    q_ptr,  # [T, H, D]
    q_strides_t,
    q_strides_h,
    out_ptr,  # float32 [splits, T, H, HEAD_DIM]
    lse_ptr,  # float32 [splits, T, H]
    tokens,  # T
    n_heads,  # H
    words,  # the pool as int32
    halves,  # as int16
    longs,  # as int64
    page_bytes,
    pages_ptr,  # descriptors of the layer's first head
    sides_ptr,
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
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
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
    table = far_ptr + sequence.to(tl.int64) * far_stride_n + head * far_stride_h

    m = tl.arange(0, M)
    d = tl.arange(0, D)
    live = m < GROUP * tl.minimum(count, 1)
    q_head = head * GROUP + m
    key_kept = d < tl.load(side + 2)  # what is dropped reads back as any code and must not count
    value_kept = d < tl.load(side + 10)
    q_at = q_ptr + (row * q_strides_t + q_head * q_strides_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & key_kept[None, :], other=0.0).to(tl.float32) * scale
    size = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)  # float16 has a short reach: queries are brought to 1
    q = (q / size[:, None]).to(DTYPE)
    size = 0.5 * size  # a plane holds twice the distance from the middle

    far, visible, low, high = share_of_far(start, count, window, sinks, recent, seal, split, splits, N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for tile in range(low, high):
        firsts = tile * N + 16 * tl.arange(0, UNITS)
        base, token, there = locate(firsts, firsts < far, table, pages, page_bytes)
        keys = stream(words, halves, longs, base, token, there, side, D, KEY_BITS)
        values = stream(words, halves, longs, base, token, there, side + 8, D, VALUE_BITS)
        s = tl.join(_scores8(q, keys, KEY_BITS, 0, 2), _scores8(q, keys, KEY_BITS, 1, 2))
        s = tl.reshape(s, [M, UNITS, 16]) * size[:, None, None]
        rows = firsts[:, None] + tl.arange(0, 16)[None, :]
        seen = (rows >= visible) & (rows < far) & there[:, None]
        s = tl.where(seen[None, :, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(tl.max(s, 2), 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe[:, None, None])
        alpha = tl.exp(top - safe)
        total = total * alpha + tl.sum(tl.sum(p, 2), 1)
        acc = acc * alpha[:, None]
        even, odd = tl.split(tl.reshape(p, [M, UNITS, 2, 2, 2, 2]))
        acc = _weighted8(_weighted8(acc, even, values, VALUE_BITS, 0, 2, DTYPE), odd, values, VALUE_BITS, 1, 2, DTYPE)
        top = new

    lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-38)), float("-inf"))
    acc = tl.where(value_kept[None, :], acc, 0.0) / tl.maximum(total, 1e-38)[:, None] * (0.5 / REACH)
    at = split.to(tl.int64) * tokens * n_heads + row * n_heads + q_head
    tl.store(lse_ptr + at, lse, mask=live)
    tl.store(out_ptr + at[:, None] * HEAD_DIM + d[None, :], acc, mask=live[:, None] & (d < HEAD_DIM)[None, :])
