"""Tracking of the best evaluation, for early stopping and for keeping the best checkpoint."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class BestEvaluation(TrainerCallback):
    """Tracks one metric, of which less is better, through the evaluations of training.

    Attributes:
        step: The step of the best evaluation; None before the first.
        value: The metric there.
        stopped: True if training ends because the metric no longer improves.
    """

    def __init__(
        self, metric: str = "eval_loss", patience: int | None = None, min_delta: float = 0.0, keep: bool = False
    ) -> None:
        """Track a metric; a decrease by more than `min_delta` is an improvement.

        Args:
            patience: Training ends after this many evaluations in a row without improvement; None: never.
            keep: Write a checkpoint at the best evaluation, and keep it.
        """
        self.metric, self.patience, self.min_delta, self.keep = metric, patience, min_delta, keep
        self.step: int | None = None
        self.value = math.inf
        self._waited, self._seen = 0, 0
        self._training = False

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._training = True

    def on_train_end(self, *_: object, **__: object) -> None:
        self._training = False

    def on_evaluate(
        self, _args: object, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: object
    ) -> None:
        if not self._training or state.global_step <= self._seen:
            return  # the evaluation before the first step, or a repeated evaluation
        self._seen = state.global_step
        value = metrics[self.metric]
        if value < self.value - self.min_delta:  # false for NaN
            self.step, self.value, self._waited = state.global_step, value, 0
            control.should_save = control.should_save or self.keep
        else:
            self._waited += 1
        if self.stopped:
            control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "waited": self._waited, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
        self._waited, self._seen = state["waited"], state["seen"]
