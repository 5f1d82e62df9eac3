"""When progress shows, and where."""

import io

import pytest
from rich.console import Console

from kvfold.cli.progress import ConsoleProgress


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=120), stream


@pytest.mark.parametrize("terminal", [True, False])
def test_short_work_shows_nothing(terminal: bool) -> None:
    target, stream = console(terminal)
    with ConsoleProgress(target, delay=3600).task("Reading", total=3) as advance:
        advance()
        advance(2)
    assert stream.getvalue() == ""


def shown_task(progress: ConsoleProgress, stream: io.StringIO, total: int | None) -> None:
    """Run a task that ends only once it has appeared."""
    with progress.task("Reading [pages]", total=total) as advance:
        while "Reading" not in stream.getvalue():
            advance()


@pytest.mark.parametrize("total", [None, 10])
def test_without_a_terminal_long_work_is_one_plain_line(total: int | None) -> None:
    target, stream = console(terminal=False)
    shown_task(ConsoleProgress(target, delay=0), stream, total)
    assert stream.getvalue() == "Reading [pages] ...\n"


@pytest.mark.parametrize("total", [None, 10])
def test_on_a_terminal_long_work_is_a_bar_that_goes_away(total: int | None) -> None:
    target, stream = console(terminal=True)
    progress = ConsoleProgress(target, delay=0)
    shown_task(progress, stream, total)
    stream.seek(0), stream.truncate()
    shown_task(progress, stream, total)  # bars can come again after the last one went
    assert progress.shown == 0
    assert not progress.bars().tasks


def interrupted_task(progress: ConsoleProgress, stream: io.StringIO) -> None:
    """Raise in the middle of a shown task that is inside another."""
    with progress.task("Outer"), progress.task("Reading") as advance:
        while "Reading" not in stream.getvalue():
            advance()
        raise KeyboardInterrupt


def test_an_interrupted_task_leaves_no_bar() -> None:
    target, stream = console(terminal=True)
    progress = ConsoleProgress(target, delay=0)
    with pytest.raises(KeyboardInterrupt):
        interrupted_task(progress, stream)
    assert progress.shown == 0
    assert not progress.bars().tasks
