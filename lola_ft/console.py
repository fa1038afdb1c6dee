"""The console that prints all messages, and the progress bar of longer work."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import rich.console


class Console(rich.console.Console):
    """A console that prints text unchanged: brackets are not markup, and lines are not broken, so paths stay whole.

    Tables and other objects of rich are laid out as usual.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines of text, or objects of rich."""
        if all(isinstance(part, str) for part in objects):
            options = {"markup": False, "highlight": False, "soft_wrap": True} | options
        super().print(*objects, **options)


Advance = Callable[[float], None]
"""A function that adds an amount of finished work to a bar."""


@contextmanager
def shown_progress(what: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar with the time left on standard error during the block; nothing if that is not a terminal.

    Args:
        what: Name of the work, shown before the bar, such as "Merging".
        total: Amount of work; None if it is not known, which shows the time used instead of the time left.
        unit: Unit of the work, such as "rows"; "" shows only a percentage.
    """
    with progress_bar(what, unit, timed=total is not None) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.advance(task, amount)


_BAR_SHOWN = ContextVar("_BAR_SHOWN", default=False)


@contextmanager
def progress_bar(what: str, unit: str = "", *more: Any, timed: bool = True) -> Iterator[Any]:
    """Show rich's progress display in the form of all verbs during the block; the caller adds a task to it.

    A second bar inside the block is not shown, because a terminal has room for only one.

    Args:
        more: Further columns of rich.
        timed: Show the time left; if False, the time used.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counted = TextColumn(f"{{task.completed:,.0f}}{' of {task.total:,.0f}' if timed else ''} {unit}")
    time = (TextColumn("time left"), TimeRemainingColumn()) if timed else (TextColumn("time used"), TimeElapsedColumn())
    columns = (TextColumn(what), BarColumn(), counted if unit else TaskProgressColumn(), *more, *time)
    console = Console(stderr=True)
    first = os.environ.get("LOCAL_RANK", "0") in ("0", "-1")  # of several processes
    shown = console.is_terminal and first and not _BAR_SHOWN.get()
    before = _BAR_SHOWN.set(True)
    try:
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            yield bar
    finally:
        _BAR_SHOWN.reset(before)
