"""Ctrl-C and SIGTERM: the first signal finishes the step and saves, a second signal stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from lola_ft.training import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and its state is saved."""


class EvaluationStopped(Exception):  # noqa: N818 - an answer to a signal, not an error
    """An evaluation was interrupted because the run was asked to stop."""


class StopRequest(TrainerCallback):
    """Records, inside its `with` block, that a signal asked the run to stop.

    Outside of training there is nothing to save, so a signal raises KeyboardInterrupt.

    Attributes:
        requested: True if the run should save and stop after this step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._training = True

    def on_train_end(self, *_: object, **__: object) -> None:
        self._training = False

    def on_prediction_step(self, *_: object, **__: object) -> None:
        # With several processes, one process must not leave an evaluation that the others take part in.
        if self.requested and self._training and processes.count() == 1:
            raise EvaluationStopped

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self._training:
            raise KeyboardInterrupt
        self.requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # a second signal then ends the process, even during a long kernel
        if processes.is_main():
            # Written without a Python stream, because the signal may interrupt that stream's own write.
            os.write(2, b"\nStopping: this step is finished and saved. Ctrl-C again stops at once.\n")
