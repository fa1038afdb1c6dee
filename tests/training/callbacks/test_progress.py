"""Progress of training: a line now and then where there is no terminal, a bar that fits where there is one."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lola_ft.training.callbacks import progress
from lola_ft.training.callbacks.progress import Progress
from lola_ft.training.run_state import RunState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, steps: int, columns: int = 120) -> str:
    """Log every step of a run; returns what standard error got."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    state: Any = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
    callback = Progress(SimpleNamespace(summary=None), RunState())  # type: ignore[arg-type]
    nothing: Any = None
    callback.on_train_begin(nothing, state, nothing)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_step_end(nothing, state, nothing)
        callback.on_log(nothing, state, nothing, {"loss": 1.234, "learning_rate": 1e-4})
    callback.on_train_end(nothing, state, nothing)
    return stream.getvalue()


def test_a_log_file_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = run(monkeypatch, io.StringIO(), 200).splitlines()
    assert first.startswith("step 1 of 200: loss 1.23, ")
    assert last.startswith("step 200 of 200: loss 1.23, ")
    assert last.endswith("done")
    assert max(len(first), len(last)) <= 60
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    assert len(run(monkeypatch, io.StringIO(), 20).splitlines()) == 20


@pytest.mark.parametrize("columns", [60, 120])
def test_a_terminal_has_a_bar(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(monkeypatch, Terminal(), 5, columns)
    assert "5/5" in written
    assert "loss=1.23" in written
    assert ("memory=" in written) == (columns == 120)
