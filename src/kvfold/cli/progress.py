"""Progress of long work on the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Timer
from typing import TYPE_CHECKING

from rich.console import Console

from kvfold.config.progress import Advance

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

DELAY = 1.5
"""Seconds a task may run before it is shown; shorter ones would only flicker."""


class ConsoleProgress:
    """A `kvfold.config.progress.Progress` that draws bars on `console`, or prints one line per task.

    Only tasks longer than `delay` seconds appear. Where the console is no terminal there is nothing to
    redraw, so a task is one line that says it has begun.
    """

    def __init__(self, console: Console | None = None, delay: float = DELAY) -> None:
        self.console = console or Console(stderr=True)
        self.delay = delay
        self.lock = Lock()
        self.shown = 0
        self._bars: RichBars | None = None

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """See `kvfold.config.progress.Progress.task`."""
        task = _Task(self, description, total)
        timer = Timer(self.delay, task.show)
        timer.daemon = True
        timer.start()
        try:
            yield task.advance
        finally:
            timer.cancel()
            task.close()

    def bars(self) -> "RichBars":
        """The bars of all tasks, made when the first appears: most commands never need them."""
        if self._bars is None:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
        return self._bars


class _Task:
    """One task; `show` runs on the timer's thread, everything else on the worker's."""

    def __init__(self, owner: ConsoleProgress, description: str, total: int | None) -> None:
        self.owner = owner
        self.description = description
        self.total = total
        self.done = 0
        self.closed = False
        self.bar: TaskID | None = None

    def show(self) -> None:
        with self.owner.lock:
            if self.closed:
                return
            if not self.owner.console.is_terminal:
                self.owner.console.print(f"{self.description} ...", markup=False, highlight=False)
                return
            bars = self.owner.bars()
            self.bar = bars.add_task(self.description, total=self.total, completed=self.done)
            if self.owner.shown == 0:
                bars.start()
            self.owner.shown += 1

    def advance(self, n: int = 1) -> None:
        with self.owner.lock:
            self.done += n
            if self.bar is not None:
                self.owner.bars().advance(self.bar, n)

    def close(self) -> None:
        with self.owner.lock:
            self.closed = True
            if self.bar is None:
                return
            bars = self.owner.bars()
            bars.remove_task(self.bar)
            self.owner.shown -= 1
            if self.owner.shown == 0:
                bars.stop()
