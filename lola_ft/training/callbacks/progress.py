"""Progress of training: a bar on a terminal; elsewhere a line now and then, so that a log file stays short."""

import sys
import time
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from lola_ft.console import Console, duration
from lola_ft.training.callbacks.gradient_check import GradientCheck
from lola_ft.training.callbacks.resources import memory_now
from lola_ft.training.run_state import RunState

_LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
_WIDE = 100
"""Columns from which the bar also has the learning rate and the memory."""


class Progress(ProgressCallback):
    """transformers' progress bar with loss and speed. It also prints the result of the gradient check once."""

    def __init__(self, check: GradientCheck, run: RunState) -> None:
        """Store the check, whose result is printed once, and the run, which counts the tokens."""
        super().__init__()
        self._run, self._check, self._said = run, check, False
        self._last = (0, time.perf_counter())
        self._began = (0, time.perf_counter())
        self._line: float | None = None
        self._evaluated: Any = None
        self._bars = sys.stderr.isatty()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (self._run.tokens_seen, time.perf_counter())
        self._began = (state.global_step, time.perf_counter())
        if self._bars:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._said and self._check.summary:
            self._said = True
            Console(stderr=True).print(("\n" if self._bars else "") + self._check.summary)
        if self._bars:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._bars:
            return
        if self.prediction_bar is not None and eval_dataloader is not self._evaluated:
            self.prediction_bar.reset(total=len(eval_dataloader))  # another language
        self._evaluated = eval_dataloader
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, _args: object, state: TrainerState, _control: object, logs: dict[str, Any], **_: object) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        now = (self._run.tokens_seen, time.perf_counter())
        speed = (now[0] - self._last[0]) / max(now[1] - self._last[1], 1e-9)
        self._last = now
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._numbers(logs, speed))
        elif self._line is None or now[1] - self._line >= _LINE_EVERY or state.global_step >= state.max_steps:
            self._line = now[1]
            print(self._in_words(state, logs, speed), file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _numbers(self, logs: dict[str, Any], speed: float) -> dict[str, str]:
        """Return what stands behind the bar; a narrow terminal has room for loss and speed only."""
        shown = {"loss": f"{logs['loss']:.3g}", "tokens/s": f"{speed:,.0f}"}
        if Console(stderr=True).width >= _WIDE:
            rate = {"learning_rate": f"{logs['learning_rate']:.3g}"} if "learning_rate" in logs else {}
            shown |= rate | {"memory": memory_now()}
        return shown

    def _in_words(self, state: TrainerState, logs: dict[str, Any], speed: float) -> str:
        """Return a line of less than 60 columns: `step 50 of 700: loss 1.23, 2,345 tokens/s, 4 min left`."""
        done = state.global_step - self._began[0]
        each = (time.perf_counter() - self._began[1]) / max(done, 1)
        left = max(0, state.max_steps - state.global_step) * each
        ending = f"{duration(left)} left" if left else "done"
        return (
            f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3g}, {speed:,.0f} tokens/s, {ending}"
        )
