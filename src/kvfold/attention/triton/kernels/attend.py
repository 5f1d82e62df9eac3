"""Attention of a tile of queries that share a KV head, over sealed pages, near slots and new rows."""

# mypy: ignore-errors
import triton
import triton.language as tl

from kvfold.attention.triton.kernels.rows import (
    PLANES,
    RAW,
    bfloat_bits,
    float_of_bits,
    gathered_rows,
    locate,
    plane_rows,
    raw_rows,
)


@triton.jit
def sealed(length, sinks, recent, seal, EXACT: tl.constexpr):
    """`CacheLayout.sealed` of lengths."""
    if EXACT:
        return length
    else:
        return sinks + tl.maximum(length - sinks - recent, 0) // seal * seal


@triton.jit
def held_position(slot, length, sinks, ring):
    """Position of the newest of `length` tokens that falls on a near slot, or -1."""
    last = length - 1 - sinks
    newest = length - 1 - (last - (slot - sinks) + ring) % ring
    found = tl.where((slot < sinks + ring) & (last >= slot - sinks), newest, -1)
    return tl.where(slot < sinks, tl.where(slot < length, slot, -1), found)


@triton.jit
def _scores(q, k):
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _absorb(s, v, top, total, acc, share, DTYPE: tl.constexpr):
    """One step of the online softmax: scores [M, N] (-inf: unseen) and values [N, D], which count `share` each."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - safe[:, None])
    alpha = tl.exp(top - safe)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot((p * share).to(DTYPE), v.to(DTYPE), input_precision="ieee")
    return new, total, acc


@triton.jit
def _sees(keys, pos, window, sinks, KEEP_SINKS: tl.constexpr):
    """Which keys (positions [N], -1: none) queries at positions [M] see, the boundary of sealing apart."""
    key = keys[None, :]
    inside = key > pos[:, None] - window
    if KEEP_SINKS:
        inside = inside | (key < sinks)
    return (key >= 0) & (key <= pos[:, None]) & inside


@triton.jit(
    do_not_specialize=["tokens", "near_stride_n", "far_stride_n", "window", "near_slots", "splits", "first_split"]
)
def attend(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, G, D], new rows
    v_ptr,
    q_strides_t,
    q_strides_h,
    k_strides_t,
    k_strides_h,
    v_strides_t,
    v_strides_h,
    out_ptr,  # [T, H, D], or float32 [splits, T, H, D]
    lse_ptr,  # float32 [T, H], or [splits, T, H]
    tokens,  # T
    n_heads,  # H
    pool,  # uint8
    words,  # the pool as int32
    halves,  # as int16
    longs,  # as int64
    near_numbers,  # as numbers of near pages
    far_numbers,  # as numbers of far pages
    page_bytes,
    pages_ptr,  # descriptors of the layer's first head
    sides_ptr,
    dims_ptr,
    steps_ptr,
    items_ptr,  # int32 [items, 2]: sequence, first query
    sequences_ptr,  # int32 [N, 4]: start, count, first row of the batch
    near_ptr,  # int32 [N, heads, columns], at the layer's first head
    near_stride_n,
    near_stride_h,
    far_ptr,
    far_stride_n,
    far_stride_h,
    heads_ptr,  # int32, KV heads of this launch
    scale,
    window,
    sinks,
    recent,
    seal,
    ring,
    near_slots,  # slots of near pages
    near_capacity,
    splits,  # programs that share the keys of one tile of queries; the last has the near ones
    first_split,  # what the others have is attended elsewhere
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # padded
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,  # whether several programs share one tile of queries
    EXACT: tl.constexpr,
    KEEP_SINKS: tl.constexpr,
    DECODE: tl.constexpr,  # one query per sequence, whose key is in its near slot already
    NEAR_BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    KEY_KIND: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_FULL: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_FULL: tl.constexpr,
    KEY_DTYPE: tl.constexpr,  # what far keys are multiplied in
    VALUE_DTYPE: tl.constexpr,
    NEAR_DTYPE: tl.constexpr,
):
    """Grid: (items, heads of the launch, splits - first_split). An item is up to M // GROUP queries of one sequence."""
    QUERIES: tl.constexpr = M // GROUP
    sequence = tl.load(items_ptr + 2 * tl.program_id(0))
    begin = tl.load(items_ptr + 2 * tl.program_id(0) + 1)
    head = tl.load(heads_ptr + tl.program_id(1))
    split = tl.program_id(2) + first_split
    start = tl.load(sequences_ptr + 4 * sequence)
    count = tl.load(sequences_ptr + 4 * sequence + 1)
    first = tl.load(sequences_ptr + 4 * sequence + 2)
    end = tl.minimum(begin + QUERIES, count)  # past the last query of the tile

    m = tl.arange(0, M)
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    query = begin + m // GROUP
    live = (m < QUERIES * GROUP) & (query < end)
    row = (first + query).to(tl.int64)
    q_head = head * GROUP + m % GROUP
    pos = start + query
    bound = sealed(pos + 1, sinks, recent, seal, EXACT)
    q_at = q_ptr + (row * q_strides_t + q_head * q_strides_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32) * scale
    size = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)  # float16 has a short reach: queries are brought to 1
    if KEY_DTYPE == tl.float16:
        far_q = (q / size[:, None]).to(KEY_DTYPE)
    else:
        far_q = q.to(KEY_DTYPE)
        size = size * 0 + 1

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)

    # Sealed rows. Those past the end of every query's view are not read.
    pages = pages_ptr + 4 * head
    side = sides_ptr + 16 * head
    dims = dims_ptr + 4 * D * head
    table = far_ptr + sequence.to(tl.int64) * far_stride_n + head * far_stride_h
    block = tl.load(pages + 1)
    last = sealed(start + end, sinks, recent, seal, EXACT) - sinks
    last = tl.where(end > begin, last, 0)
    low = tl.maximum(start + begin - window + 1 - sinks, 0) // N
    high = tl.cdiv(last, N)
    if SPLIT:
        far_splits = splits if EXACT else splits - 1
        each = tl.cdiv(high - low, far_splits)
        low = low + split * each
        high = tl.where(split < far_splits, tl.minimum(high, low + each), low)
    for tile in range(low, high):
        rows = tile * N + n
        inside = rows < last
        base, token, there = locate(rows, inside, table, pages, page_bytes)
        if KEY_KIND == PLANES or VALUE_KIND == PLANES:
            firsts = tile * N + 16 * tl.arange(0, N // 16)
            unit_base, unit_token, unit_there = locate(firsts, firsts < last, table, pages, page_bytes)
        if KEY_KIND == PLANES:
            k = plane_rows(
                words, halves, longs, unit_base, unit_token, unit_there, side, D, KEY_BITS, KEY_FULL, KEY_DTYPE
            )
            s = _scores(far_q, k) * (0.5 * size)[:, None]
        else:
            if KEY_KIND == RAW:
                k = raw_rows(far_numbers, base, there, side, D, KEY_BITS // 8, KEY_FULL)
            else:
                k = gathered_rows(pool, base, token, there, side, dims, block, steps_ptr, D, UNIT, KEY_SCALE)
            if KEY_DTYPE == tl.float16:
                k = tl.clamp(k, -65504.0, 65504.0)
            s = _scores(far_q, k.to(KEY_DTYPE)) * size[:, None]
        seen = _sees(rows + sinks, pos, window, 0, False) & (rows[None, :] + sinks < bound[:, None])
        s = tl.where(seen & there[None, :], s, float("-inf"))
        if VALUE_KIND == PLANES:
            v = plane_rows(
                words,
                halves,
                longs,
                unit_base,
                unit_token,
                unit_there,
                side + 8,
                D,
                VALUE_BITS,
                VALUE_FULL,
                VALUE_DTYPE,
            )
            top, total, acc = _absorb(s, v, top, total, acc, 0.5, VALUE_DTYPE)
        else:
            if VALUE_KIND == RAW:
                v = raw_rows(far_numbers, base, there, side + 8, D, VALUE_BITS // 8, VALUE_FULL)
            else:
                v = gathered_rows(
                    pool, base, token, there, side + 8, dims + 2 * D, block, steps_ptr, D, UNIT, VALUE_SCALE
                )
                # A row that was never written can have a scale that is no number.
                v = tl.where(there[:, None], v, 0.0)
            if VALUE_DTYPE == tl.float16:
                v = tl.clamp(v, -65504.0, 65504.0)
            top, total, acc = _absorb(s, v, top, total, acc, 1.0, VALUE_DTYPE)

    if not EXACT:
        near_q = q.to(NEAR_DTYPE)
        slots = near_slots
        if SPLIT:
            slots = tl.where(split == splits - 1, slots, 0)
        length = start + count if DECODE else start
        slots = tl.minimum(slots, length)
        oldest = sealed(start + begin + 1, sinks, recent, seal, EXACT)  # that any query here sees near, sinks apart
        near_table = near_ptr + sequence.to(tl.int64) * near_stride_n + head * near_stride_h
        for tile in range(0, tl.cdiv(slots, N)):
            slot = tile * N + n
            keys = held_position(slot, length, sinks, ring)
            # What was sealed when it came was never written here.
            keys = tl.where((keys < sinks) | (keys >= oldest), keys, -1)
            page = tl.load(near_table + slot // near_capacity, mask=keys >= 0, other=-1)
            there = (keys >= 0) & (page >= 0)
            base = tl.where(there, page, 0).to(tl.int64) * page_bytes + slot % near_capacity * (
                2 * HEAD_DIM * NEAR_BYTES
            )
            at = near_numbers + (base // NEAR_BYTES)[:, None] + d[None, :]
            some = there[:, None] & (d < HEAD_DIM)[None, :]
            seen = _sees(tl.where(there, keys, -1), pos, window, sinks, KEEP_SINKS)
            seen = seen & ((keys < sinks)[None, :] | (keys[None, :] >= bound[:, None]))
            s = _scores(near_q, tl.load(at, mask=some, other=0.0).to(NEAR_DTYPE))
            s = tl.where(seen, s, float("-inf"))
            v = tl.load(at + HEAD_DIM, mask=some, other=0.0)
            top, total, acc = _absorb(s, v, top, total, acc, 1.0, NEAR_DTYPE)
        if not DECODE:
            if not KEEP_SINKS:
                oldest = tl.maximum(oldest, start + begin - window + 1)
            recent_tile = tl.maximum(oldest - start, 0) // N
            sink_tiles = tl.minimum(tl.cdiv(tl.maximum(sinks - start, 0), N), recent_tile)  # sinks among the new rows
            for i in range(recent_tile - sink_tiles, tl.cdiv(end, N)):
                new = tl.where(i < recent_tile, i - recent_tile + sink_tiles, i) * N + n
                some = (new < end)[:, None] & (d < HEAD_DIM)[None, :]
                at = (first + new).to(tl.int64)[:, None]
                k = tl.load(k_ptr + at * k_strides_t + head * k_strides_h + d[None, :], mask=some, other=0.0)
                v = tl.load(v_ptr + at * v_strides_t + head * v_strides_h + d[None, :], mask=some, other=0.0)
                k = k.to(tl.float32)
                v = v.to(tl.float32)
                if NEAR_BYTES == 2:
                    k = float_of_bits(bfloat_bits(k))
                    v = float_of_bits(bfloat_bits(v))
                keys = tl.where(new < end, start + new, -1)
                seen = _sees(keys, pos, window, sinks, KEEP_SINKS)
                seen = seen & ((keys < sinks)[None, :] | (keys[None, :] >= bound[:, None]))
                s = tl.where(seen, _scores(near_q, k.to(NEAR_DTYPE)), float("-inf"))
                top, total, acc = _absorb(s, v, top, total, acc, 1.0, NEAR_DTYPE)

    lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-38)), float("-inf"))
    acc = acc / tl.maximum(total, 1e-38)[:, None]
    at = row * n_heads + q_head
    if SPLIT:
        at = at + split.to(tl.int64) * tokens * n_heads
    tl.store(lse_ptr + at, lse, mask=live)
    some = live[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + at[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=some)
