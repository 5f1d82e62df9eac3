"""Random cache layouts for tests: small pages, several widths, windows, sinks."""

from hypothesis import strategies as st

from kvfold.kv.format import PageFormat, Row, Segment, raw_format
from kvfold.kv.layout import CacheLayout

PAGE_BYTES = 64
HEAD_DIM = 4
BLOCK = 4


def coded_format(bits: int) -> PageFormat:
    """`bits`-bit codes in blocks of 4 tokens: 8, 12, 16, 20 or 32 tokens per page for 8, 5, 4, 3 or 2 bits."""
    row = Row((Segment(bits, HEAD_DIM),))
    return PageFormat(PAGE_BYTES, HEAD_DIM, BLOCK, row, row)


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    windows = tuple(draw(st.lists(st.sampled_from([None, 1, 5, 30]), min_size=1, max_size=2)))
    near = raw_format(PAGE_BYTES, HEAD_DIM)
    kv_heads = draw(st.integers(1, 2))
    if draw(st.integers(0, 3)) == 0:
        return CacheLayout(((near,) * kv_heads,) * len(windows), near, 0, 0, windows, exact=True)
    widths = st.sampled_from([2, 4, 5, 8])
    far = tuple(tuple(coded_format(draw(widths)) for _ in range(kv_heads)) for _ in windows)
    return CacheLayout(far, near, draw(st.integers(0, 5)), draw(st.integers(1, 12)), windows)
