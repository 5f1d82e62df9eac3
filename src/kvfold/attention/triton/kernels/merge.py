"""What several programs found for the same queries, in one."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "splits"])
def merge(
    parts,  # float32 [splits, rows, HEAD_DIM]
    part_lses,  # float32 [splits, rows]
    out,  # [rows, HEAD_DIM]
    lses,  # float32 [rows]
    rows,
    splits,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
):
    """Joins what the splits of each row found, by their log-sum-exp. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED)
    d = tl.arange(0, D)
    at = split.to(tl.int64) * rows + row
    lse = tl.load(part_lses + at, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - top)
    total = tl.sum(weight, 0)
    some = ((split < splits) & (weight > 0))[:, None] & (d < HEAD_DIM)[None, :]
    part = tl.load(parts + at[:, None] * HEAD_DIM + d[None, :], mask=some, other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / tl.maximum(total, 1e-38)
    tl.store(out + row * HEAD_DIM + d, joined.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lses + row, tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-38)), float("-inf")))
