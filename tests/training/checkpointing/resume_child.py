"""Runs verbs in a process of its own, which may be killed at a moment that a test chooses."""

import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lola_ft.cli import main
from lola_ft.training import run
from lola_ft.training.callbacks import stop_request
from lola_ft.training.checkpointing import checkpoint, contents
from lola_ft.training.reports import metrics
from lola_ft.training.trainers.run_trainer import RunTrainer


def run_verb(arguments: list[str], folder: str, moment: str = "", step: int = 0, act: str = "kill") -> None:
    """What the child process does; its output goes to `folder`/out.txt.

    Args:
        moment: When something happens to this process: one of MOMENTS.
        step: In which step.
        act: What happens: one of ACTS.
    """
    from tests import pictures

    torch.set_num_threads(1)
    descriptor = os.open(Path(folder) / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.enable()  # a crash says in which thread, and where
    os.environ["COLUMNS"] = "200"
    if moment:
        MOMENTS[moment](step, ACTS[act])
    try:
        with pictures.undrawn():
            main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _signal(*numbers: int) -> Callable[[], None]:
    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


def _no_room() -> None:
    """From now on no file can grow beyond 40 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _clock_jump(seconds: float) -> Callable[[], None]:
    """From now on the time of day is another; what measures durations is not touched, as on a real machine."""

    def jump() -> None:
        real = time.time
        time.time = lambda: real() + seconds  # type: ignore[method-assign]

    return jump


_YEAR = 365 * 86400.0

ACTS: dict[str, Callable[[], None]] = {
    "a year back": _clock_jump(-_YEAR),
    "a year ahead": _clock_jump(_YEAR),
    "kill": _signal(signal.SIGKILL),
    "ctrl-c": _signal(signal.SIGINT),
    "ctrl-c twice": _signal(signal.SIGINT, signal.SIGINT),
    "terminate": _signal(signal.SIGTERM),
    "no room": _no_room,
}


def _after(owner: Any, name: str, when: Callable[..., bool], act: Callable[[], None]) -> None:
    """Do something once, after a function was called with arguments that are looked for."""
    original, done = getattr(owner, name), list[bool]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not done and when(*args, **kwargs):
            done.append(True)
            act()
        return result

    setattr(owner, name, wrapped)


def _in_folder(step: int) -> Callable[..., bool]:
    return lambda folder, *_: f"step-{step}." in folder.name


MOMENTS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    "logged": lambda step, act: _after(
        metrics.MetricsFile, "on_log", lambda _self, _args, state, *_, **__: state.global_step == step, act
    ),
    "substep": lambda step, act: _after(
        RunTrainer, "training_step", lambda self, *_, **__: self.state.global_step == step, act
    ),
    "evaluating": lambda step, act: _after(
        stop_request.StopRequest,
        "on_prediction_step",
        lambda _self, _args, state, *_, **__: state.global_step == step,
        act,
    ),
    "state written": lambda step, act: _after(contents, "write_state", _in_folder(step), act),
    "sums written": lambda step, act: _after(checkpoint, "_write_sums", _in_folder(step), act),
    "renamed": lambda step, act: _after(
        checkpoint, "checkpoints", lambda folder: (folder / f"step-{step}").exists(), act
    ),
    "trained": lambda step, act: _after(run, "_fit", lambda *_: True, act),  # noqa: ARG005
}
