"""Several ways to do the same step, each in its own process, with steps in turns.

Separate processes keep the ways independent (kernels of the matrix library, memory). Turns make a busy machine slow all
of them equally.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from memory import Peak, peak_resident

from lola_ft.memory import give_back_freed_memory

Step = Callable[[], float]
"""Function that does one step and returns its seconds."""
MakeStep = Callable[[], Step]
"""Function that loads a model and returns its step. It must be picklable: a module's function or a `partial`."""


def in_turns(
    ways: Mapping[str, MakeStep], rounds: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Run the ways' steps in turns.

    Args:
        warmup: Number of first rounds that do not count.

    Returns:
        Seconds of each counted step, and the figures of `serve`, by way.
    """
    with ExitStack() as running:
        started = {name: running.enter_context(_Way(make)) for name, make in ways.items()}
        for way in started.values():
            way.ask("figures")  # loads the model: one way at a time, so that loading disturbs no steps
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(warmup + rounds):
            for name, way in started.items():
                taken = way.ask("step")
                if round_ >= warmup:
                    seconds[name].append(taken)
        return seconds, {name: way.ask("figures") for name, way in started.items()}


class _Way:
    """A process that does a way's steps on request."""

    def __init__(self, make: MakeStep) -> None:
        self._make, context = make, multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._theirs, make), daemon=True)

    def __enter__(self) -> "_Way":
        self._process.start()  # it imports, beside the others, until it is asked
        self._theirs.close()  # so that `ask` ends instead of waiting if the process fails
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ConnectionError):  # a process that failed may be about to end
            self._pipe.send(None)
        self._process.join()

    def ask(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"The process of {self._make} ended; what it said is above.") from None


def serve(pipe: Connection, make: MakeStep) -> None:
    """Load a way's model at the first question. Answer `step` with its seconds, and `figures` with these figures.

    after_imports: Resident MB before the model is loaded.
    whole: Largest resident MB.
    steps_anonymous: Largest anonymous MB in a step.
    gpu: Largest MB that torch used of a GPU.
    cpu_s: Processor seconds of the median step on all threads. A busy machine changes them less than the duration, if
        waiting threads sleep (OMP_WAIT_POLICY=PASSIVE).
    """
    figures = {"after_imports": peak_resident(), "steps_anonymous": 0.0, "cpu_s": 0.0}
    step: Step | None = None
    cpu_s: list[float] = []
    while (what := pipe.recv()) is not None:
        if step is None:
            step = make()
            gc.collect()
            give_back_freed_memory()
        if what == "figures":
            gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
            figures["cpu_s"] = round(statistics.median(cpu_s), 3) if cpu_s else 0.0
            pipe.send(figures | {"whole": peak_resident(), "gpu": round(gpu, 1)})
            continue
        began = time.process_time()
        with Peak() as peak:
            seconds = step()
        cpu_s.append(time.process_time() - began)
        figures["steps_anonymous"] = max(figures["steps_anonymous"], peak.result()["anonymous"])
        pipe.send(seconds)
