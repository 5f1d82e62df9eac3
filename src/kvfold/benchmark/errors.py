"""Errors of a benchmark that the user can put right."""

from kvfold.errors import KvfoldError


class BenchmarkError(KvfoldError):
    """A server that cannot be measured: unreachable, refusing, without the model, or failing every request."""


class TraceError(KvfoldError, ValueError):
    """A trace or a data set that cannot be read; the message names the line."""
