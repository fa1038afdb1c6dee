"""The bar of work that takes a while: on a terminal only, and only on standard error."""

import io
import sys

import pytest

from lola_ft.console import shown_progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, total: float | None, unit: str) -> str:
    """Do half of some work under a bar; returns what the stream got."""
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
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
