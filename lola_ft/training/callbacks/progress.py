"""The progress bar: one line with loss, speed, time left and memory, in place of a printed dictionary per step."""

import time
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from lola_ft.console import Console
from lola_ft.training.callbacks.gradient_check import GradientCheck
from lola_ft.training.callbacks.resources import memory_now
from lola_ft.training.run_state import RunState


class Progress(ProgressCallback):
    """transformers' progress bar with numbers added. It also prints the result of the gradient check once."""

    def __init__(self, check: GradientCheck, run: RunState) -> None:
        """Store the check, whose result is printed once, and the run, which counts the tokens."""
        super().__init__()
        self._run, self._check, self._said = run, check, False
        self._last = (0, time.perf_counter())
        self._evaluated: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (self._run.tokens_seen, time.perf_counter())
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._said and self._check.summary:
            self._said = True
            Console(stderr=True).print(f"\n{self._check.summary}")
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.prediction_bar is not None and eval_dataloader is not self._evaluated:
            self.prediction_bar.reset(total=len(eval_dataloader))  # another language
        self._evaluated = eval_dataloader
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, _args: object, _state: object, _control: object, logs: dict[str, Any], **_: object) -> None:
        if self.training_bar is not None and "loss" in logs:
            shown: dict[str, str] = {key: f"{logs[key]:.3g}" for key in ("loss", "learning_rate") if key in logs}
            now = (self._run.tokens_seen, time.perf_counter())
            speed = (now[0] - self._last[0]) / max(now[1] - self._last[1], 1e-9)
            self._last = now
            shown |= {"tokens/s": f"{speed:,.0f}", "memory": memory_now()}
            self.training_bar.set_postfix(shown)
