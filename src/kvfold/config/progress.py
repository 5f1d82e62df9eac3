"""How long work tells someone how far it is, without knowing who listens.

Rooms that work long take a `Progress`; the command line passes one that draws bars, everybody else `SILENT`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells that `n` more units of a task are done."""

    def __call__(self, n: int = 1) -> None: ...


class Progress(Protocol):
    """A listener to the progress of tasks, which may be nested."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Begin a task of `total` units (None: unknown); leaving the context ends it, finished or not."""
        ...


class SilentProgress:
    """Listens and says nothing."""

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.task`."""
        yield _ignore


def _ignore(n: int = 1) -> None:
    """Accept any progress."""


SILENT: Progress = SilentProgress()
"""The default listener."""
