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
