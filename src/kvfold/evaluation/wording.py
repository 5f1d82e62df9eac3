"""Figures as people read them."""

import math

from kvfold.evaluation.bootstrap import Estimate, growth
from kvfold.evaluation.measures import Measure


def told(measure: Measure, change: Estimate, value: float | None = None) -> str:
    """An estimate with its interval, in the measure's unit; shares get their value in front where it is given."""
    if measure.unit == "perplexity":
        change = growth(change)
    signed = measure.relative
    text = _number(measure, change.mean, signed)
    if not math.isnan(change.low):
        text += f" [{_number(measure, change.low, signed)}, {_number(measure, change.high, signed)}]"
    if measure.unit == "share" and signed and value is not None:
        return f"{value:.0%} ({text})"
    return text


def dense_value(measure: Measure, value: float) -> str:
    """What the dense cache has of a relative measure."""
    if measure.unit == "perplexity":
        return f"{math.exp(value):.2f}"
    return f"{value:.0%}" if measure.unit == "share" else f"{value:.3f}"


def heading(measure: Measure) -> str:
    """A measure's name with its unit."""
    return f"{measure.label}, nats" if measure.unit == "nats" else measure.label


def _number(measure: Measure, value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    if measure.unit == "perplexity":
        return f"{value:{sign}.2%}"
    if measure.unit == "share":
        return f"{value:{sign}.1%}"
    return f"{value:{sign}.4f}" if abs(value) < 1 else f"{value:{sign}.2f}"
