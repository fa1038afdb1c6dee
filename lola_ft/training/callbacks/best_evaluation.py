"""The best evaluation so far: when to stop early, and which checkpoint to keep."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class BestEvaluation(TrainerCallback):
    """Follows one metric, of which less is better, through the evaluations of training.

    Attributes:
        step: The step of the best evaluation; None before the first.
        value: The metric there.
        stopped: Whether training ends because it no longer gets better.
    """

    def __init__(
        self, metric: str = "eval_loss", patience: int | None = None, min_delta: float = 0.0, keep: bool = False
    ) -> None:
        """Follow a metric, of which `min_delta` less counts as better.

        Args:
            patience: So many evaluations in a row without a better one end the training; None: never.
            keep: Ask for a checkpoint of the best evaluation, which then stays.
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
            return  # the evaluation before the first step, or one that is repeated
        self._seen = state.global_step
        value = metrics[self.metric]
        if value < self.value - self.min_delta:  # never of NaN
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
