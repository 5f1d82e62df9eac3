"""Random cache layouts for tests: small pages, several widths, windows, sinks."""

from hypothesis import strategies as st

from kvfold.kv.format import PageFormat, Row, Segment, raw_format
from kvfold.kv.layout import CacheLayout

PAGE_BYTES = 64
HEAD_DIM = 4
BLOCK = 4


def coded_format(key_bits: int, value_bits: int) -> PageFormat:
    """Codes in blocks of 4 tokens; 16, 10, 8 or 4 bits for a key and a value: 8, 12, 16 or 32 tokens per page."""
    key, value = Row((Segment(key_bits, HEAD_DIM),)), Row((Segment(value_bits, HEAD_DIM),))
    return PageFormat(PAGE_BYTES, HEAD_DIM, BLOCK, key, value)


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    windows = tuple(draw(st.lists(st.sampled_from([None, 1, 5, 30]), min_size=1, max_size=2)))
    near = raw_format(PAGE_BYTES, HEAD_DIM)
    kv_heads = draw(st.integers(1, 2))
    if draw(st.integers(0, 3)) == 0:
        return CacheLayout(((near,) * kv_heads,) * len(windows), near, 0, 0, windows, exact=True)
    widths = st.sampled_from([(8, 8), (8, 2), (4, 4), (2, 2)])
    far = tuple(tuple(coded_format(*draw(widths)) for _ in range(kv_heads)) for _ in windows)
    return CacheLayout(far, near, draw(st.integers(0, 5)), draw(st.integers(1, 12)), windows)
