"""The console that all messages are printed on, and the bar of work that takes a while."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import rich.console


class Console(rich.console.Console):
    """Prints lines of text as they are: no brackets read as markup, no line broken in the middle of a path.

    Tables and other things of rich's own are laid out as rich does.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines, or things of rich's own."""
        if all(isinstance(part, str) for part in objects):
            options = {"markup": False, "highlight": False, "soft_wrap": True} | options
        super().print(*objects, **options)


Advance = Callable[[float], None]
"""Tells a bar how much more is done."""


@contextmanager
def shown_progress(what: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar with the time left on standard error while the block runs; nothing in a pipe or a file.

    Args:
        what: What is done, in front of the bar, such as "Merging".
        total: How much there is to do; None if that is not known, which shows the time used instead.
        unit: What is counted, such as "rows"; "" shows a percentage only.
    """
    with progress_bar(what, unit, timed=total is not None) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.advance(task, amount)


_WIDE = 80
"""Columns from which a bar has words beside the time."""
_BAR_SHOWN = ContextVar("_BAR_SHOWN", default=False)


@contextmanager
def progress_bar(what: str, unit: str = "", *more: Any, timed: bool = True) -> Iterator[Any]:
    """Show rich's display of progress as every verb has it while the block runs; the caller adds a task to it.

    A second bar inside the block is not shown: a terminal has room for one.

    Args:
        more: Further columns of rich's.
        timed: Show the time left; otherwise the time used.
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
    shown = console.is_terminal and first and not _BAR_SHOWN.get()
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
