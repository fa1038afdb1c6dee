"""The best evaluation so far: when to stop early, and which checkpoint to keep."""

import math
from typing import Any

from transformers import TrainerCallback


class Best(TrainerCallback):
    """Follows one metric, of which less is better, through the evaluations of training.

    Attributes:
        step: The step of the best evaluation; None before the first.
        value: The metric there.
        stopped: Whether training ends because it no longer gets better.
    """

    def __init__(self, metric: str = "eval_loss", patience: int | None = None, min_delta: float = 0.0) -> None:
        """Follow a metric.

        Args:
            patience: So many evaluations in a row without a better one end the training; None: never.
            min_delta: How much lower counts as better.
        """
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.step: int | None = None
        self.value = math.inf
        self._waited, self._seen = 0, 0
        self._training = False

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        if not self._training or state.global_step <= self._seen:
            return  # the evaluation before the first step, or one that is repeated
        self._seen = state.global_step
        value = metrics[self.metric]
        if value < self.value - self.min_delta:  # never of NaN
            self.step, self.value, self._waited = state.global_step, value, 0
        else:
            self._waited += 1
        if self.stopped:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "waited": self._waited, "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
        self._waited, self._seen = state["waited"], state["seen"]
