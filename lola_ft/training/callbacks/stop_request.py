"""Ctrl-C and SIGTERM: the first lets the step end and saves, a second stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from lola_ft.training import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; what it had done is saved."""


class EvaluationStopped(Exception):  # noqa: N818 - an answer to a signal, not an error
    """An evaluation was left because the run was asked to stop."""


class StopRequest(TrainerCallback):
    """Remembers, while it is entered, that a signal asked the run to stop.

    Outside of training there is nothing to save: there a signal is a KeyboardInterrupt.

    Attributes:
        requested: Whether to save and stop after this step.
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
        # One of several processes must not leave what the others are doing with it.
        if self.requested and self._training and processes.count() == 1:
            raise EvaluationStopped

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self._training:
            raise KeyboardInterrupt
        self.requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the second is the system's: it ends even a long kernel
        if processes.is_main():
            # Not through a stream: the signal may have come in the middle of one's work.
            os.write(2, b"\nStopping: this step is finished and saved. Ctrl-C again stops at once.\n")
