"""The solver finds the largest member that fits, whatever the sizes are, and never one that does not."""

from hypothesis import given
from hypothesis import strategies as st

from kvfold.config.method import parse_method
from kvfold.errors import ConfigError
from kvfold.evaluation.families import BITS, SHARE, Family, Form
from kvfold.evaluation.solver import Fit, Misfit, solve

DENSE = 16_000  # bytes: a bit per number is 1,000
KNOBS = {"bits": Form(parse_method("some"), 0, "bits", BITS), "budget": Form(parse_method("some"), 0, "budget", SHARE)}


def value(method: str) -> float:
    (argument,) = parse_method(method).calls[0].arguments.values()
    assert isinstance(argument, float)
    return argument


@given(
    st.sampled_from(sorted(KNOBS)),
    st.floats(0.1, 16),
    st.integers(0, 9000),
    st.floats(10, 3000),
    st.integers(1, 700),
    st.floats(0, 1),
)
def test_the_largest_member_that_fits(
    name: str, bits: float, fixed: int, slope: float, page: int, refused_below: float
) -> None:
    """Sizes grow in steps of a page from a fixed part on; members below a limit are refused."""
    form = KNOBS[name]
    assert form.knob is not None
    low, high = form.knob.low, form.knob.high
    least = low + refused_below * (high - low) * 0.9

    def bytes_of(method: str) -> int:
        if value(method) < least:
            raise ConfigError("too small")
        return fixed + round(slope * value(method)) // page * page

    limit = bits * DENSE / 16
    members = [form.method(form.knob.value(i)) for i in range(form.knob.last + 1)]
    allowed = [m for m in members if value(m) >= least and bytes_of(m) <= limit]
    found = solve(Family("some", (form,)), bits, DENSE, bytes_of)
    if not allowed:
        assert isinstance(found, Misfit)
        assert "takes at least" in found.reason
    else:
        assert isinstance(found, Fit)
        assert found.method == allowed[-1]
        assert found.bytes == bytes_of(found.method) == max(map(bytes_of, allowed))


@given(st.floats(0.5, 16), st.lists(st.integers(1, 16_000), min_size=16, max_size=16))
def test_what_is_found_fits_even_where_sizes_jump(bits: float, sizes: list[int]) -> None:
    found = solve(Family("some", (KNOBS["bits"],)), bits, DENSE, lambda method: sizes[int(value(method)) - 1])
    if isinstance(found, Fit):
        assert found.bytes == sizes[int(value(found.method)) - 1] <= bits * DENSE / 16


@given(st.floats(1, 16), st.lists(st.integers(1, 20_000), min_size=1, max_size=5, unique=True))
def test_of_complete_forms_the_largest_that_fits(bits: float, sizes: list[int]) -> None:
    size_of = {f"some(bits={i})": size for i, size in enumerate(sizes)}
    family = Family("some", tuple(Form(parse_method(method)) for method in size_of))
    found = solve(family, bits, DENSE, size_of.__getitem__)
    fitting = [size for size in sizes if size <= bits * DENSE / 16]
    if fitting:
        assert isinstance(found, Fit)
        assert found.bytes == size_of[found.method] == max(fitting)
    else:
        assert isinstance(found, Misfit)


def test_a_method_that_always_refuses_says_why() -> None:
    def bytes_of(method: str) -> int:
        raise ConfigError("it does not suit this model")

    found = solve(Family("some", (KNOBS["bits"],)), 4, DENSE, bytes_of)
    assert found == Misfit("it does not suit this model")
