"""The bar of work that takes a while: on a terminal only, and only on standard error."""

import io
import re
import sys

import pytest
from rich.progress import TextColumn

from lola_ft.console import duration, progress_bar, shown_progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, total: float | None, unit: str, columns: int = 120
) -> str:
    """Do half of some work under a bar; returns what the stream got."""
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with shown_progress("Merging", total, unit) as advance:
        advance(5)
    return stream.getvalue()


def test_a_terminal_sees_what_is_done_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = shown(monkeypatch, Terminal(), 10, "tensors")
    assert "Merging" in written
    assert "5 of 10 tensors" in written
    assert "time left" in written
    assert "50%" in shown(monkeypatch, Terminal(), 10, "")
    assert "time used" in shown(monkeypatch, Terminal(), None, "rows")
    assert capsys.readouterr().out == ""


def test_a_bar_inside_another_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress("Answering", 10) as advance, shown_progress("Loading", 10):
        advance(5)
    assert "Answering" in terminal.getvalue()
    assert "Loading" not in terminal.getvalue()
    assert "Merging" in shown(monkeypatch, Terminal(), 10, "tensors"), "one after another both are"


def test_a_pipe_and_other_processes_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), 10, "tensors") == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert shown(monkeypatch, Terminal(), 10, "tensors") == ""


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = set(COLOURS.findall(shown(monkeypatch, Terminal(), 10, "tensors")))
    assert any("3" in code for code in coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = set(COLOURS.findall(shown(monkeypatch, Terminal(), 10, "tensors")))
    assert not any(re.search(r"\[(?:\d;)*(?:3|4|9|10)\d", code) for code in plain)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_bar_is_one_line_of_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """The longest one: pre-training, with its loss."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_bar("Pre-training", "steps", TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        bar.update(bar.add_task("", total=800, loss=4.5), completed=400)
        bar.refresh()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert "Pre-training" in last, "a wrapped bar would have its words on other lines"
    assert "400 of 800 steps" in last
    assert "loss 4.500" in last
    assert len(last.rstrip()) <= columns


@pytest.mark.parametrize(("seconds", "says"), [(7.4, "7 s"), (99, "99 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_times_for_people(seconds: float, says: str) -> None:
    assert duration(seconds) == says
