"""The free number of a family such that what is held takes as many bytes as allowed, and no more."""

from collections.abc import Callable
from dataclasses import dataclass

from kvfold.errors import ConfigError
from kvfold.evaluation.families import Family, Form

BytesOf = Callable[[str], int]
"""Bytes held under a complete method string. Raises ConfigError for a method that refuses its arguments."""


@dataclass(frozen=True)
class Fit:
    """A complete method string and the bytes that it holds."""

    method: str
    bytes: int


@dataclass(frozen=True)
class Misfit:
    """Why a family has no place at a budget; a sentence."""

    reason: str


def solve(family: Family, bits: float, dense_bytes: int, bytes_of: BytesOf) -> Fit | Misfit:
    """The largest member of a family that holds at most `bits` / 16 of `dense_bytes`.

    `bytes_of` should not fall where the knob rises; what is returned fits in any case. Members that are refused
    (ConfigError) count as too small: limits such as sinks + recent are what a method cannot go below.
    """
    found = [_largest(form, bits, dense_bytes, bytes_of) for form in family.forms]
    fits = [outcome for outcome in found if isinstance(outcome, Fit)]
    return max(fits, key=lambda fit: fit.bytes) if fits else found[0]


def _largest(form: Form, bits: float, dense_bytes: int, bytes_of: BytesOf) -> Fit | Misfit:
    limit = bits * dense_bytes / 16
    try:
        if form.knob is None:
            size = bytes_of(form.method())
            return Fit(form.method(), size) if size <= limit else _too_large(size, dense_bytes)
        top = form.method(form.knob.high)
        size = bytes_of(top)
    except ConfigError as error:
        return Misfit(str(error))
    if size <= limit:
        return Fit(top, size)
    within, beyond, least = -1, form.knob.last, size
    while beyond - within > 1:
        middle = (within + beyond) // 2
        held = _size(form, middle, bytes_of)
        if held is not None and held > limit:
            beyond, least = middle, held
        else:
            within = middle
    held = _size(form, within, bytes_of) if within >= 0 else None
    if held is None:
        return _too_large(least, dense_bytes)
    return Fit(form.method(form.knob.value(within)), held)


def _size(form: Form, index: int, bytes_of: BytesOf) -> int | None:
    assert form.knob is not None
    try:
        return bytes_of(form.method(form.knob.value(index)))
    except ConfigError:
        return None


def _too_large(size: int, dense_bytes: int) -> Misfit:
    return Misfit(f"takes at least {16 * size / dense_bytes:.2f} bits")
