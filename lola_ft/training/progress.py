"""The progress bar: one line with loss and speed in place of a printed dictionary a step."""

from typing import Any

from rich.console import Console
from transformers.trainer_callback import ProgressCallback

from lola_ft.training.first_step import FirstStepCheck


class Progress(ProgressCallback):
    """transformers' bar, with the numbers in it; says once what the first step's check found."""

    def __init__(self, check: FirstStepCheck) -> None:
        super().__init__()
        self._check = check
        self._said = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._said and self._check.summary:
            self._said = True
            Console(stderr=True).print(f"\n{self._check.summary}")
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:  # noqa: ARG002
        if self.training_bar is not None and "loss" in logs:
            shown = {key: f"{logs[key]:.3g}" for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self.training_bar.set_postfix(shown)
