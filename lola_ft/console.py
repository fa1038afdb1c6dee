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


_WIDE = 80
"""Columns from which a bar has words beside the time."""
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
    console = Console(stderr=True)
    # On a narrow terminal all of it stays on one line: a short bar, and no words beside the time.
    words = [TextColumn("time left" if timed else "time used")] if console.width >= _WIDE else []
    bar = BarColumn(bar_width=max(4, min(40, console.width - 60)))
    count = counted if unit else TaskProgressColumn()
    columns = (TextColumn(what), bar, count, *more, *words, TimeRemainingColumn() if timed else TimeElapsedColumn())
    first = os.environ.get("LOCAL_RANK", "0") in ("0", "-1")  # of several processes
    terminal = console.is_terminal and console.file.isatty()  # FORCE_COLOR makes no terminal of a pipe
    shown = terminal and first and not _BAR_SHOWN.get()
    before = _BAR_SHOWN.set(True)
    try:
        with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
            yield progress
    finally:
        _BAR_SHOWN.reset(before)


def duration(seconds: float) -> str:
    """Return a time for people: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, what: str) -> str:
    """Return a count with its noun, such as "1 row" and "2,000 rows"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
