"""Random page formats for tests."""

from hypothesis import strategies as st

from kvfold.kv.format import PageFormat, Row, Scale, Segment, unit_tokens


@st.composite
def rows(draw: st.DrawFn, head_dim: int, block: int) -> Row:
    coded = [b for b in range(1, 9) if b * unit_tokens(block) % 8 == 0]
    scale = draw(st.sampled_from(list(Scale)))
    widths = draw(st.lists(st.sampled_from(coded), max_size=4, unique=True).map(lambda w: sorted(w, reverse=True)))
    if scale is Scale.STATIC and draw(st.booleans()):
        widths = [draw(st.sampled_from([16, 32])), *widths]
    segments, left = [], head_dim
    for width in widths:
        dims = draw(st.integers(0, left))
        if dims:
            segments.append(Segment(width, dims))
            left -= dims
    kept = head_dim - left
    if not kept:
        scale = Scale.STATIC
    group = None
    if scale is Scale.TOKEN:
        group = draw(st.sampled_from([None, *[g for g in range(1, kept + 1) if kept % g == 0]]))
    sums = scale in (Scale.TOKEN, Scale.CHANNEL) and draw(st.booleans())
    return Row(tuple(segments), scale, group, sums)


@st.composite
def formats(draw: st.DrawFn, head_dim: int | None = None, block: int | None = None) -> PageFormat:
    d = head_dim or draw(st.sampled_from([4, 6, 16, 33]))
    b = block or draw(st.sampled_from([1, 2, 4, 8, 12, 16, 32, 48]))
    key, value = draw(rows(d, b)), draw(rows(d, b))
    if key.kept == value.kept == 0:
        key = Row((Segment(8, 1),))
    size = key.nbytes(b) + value.nbytes(b)
    return PageFormat(size * draw(st.integers(1, 4)) + draw(st.integers(0, size - 1)), d, b, key, value)
