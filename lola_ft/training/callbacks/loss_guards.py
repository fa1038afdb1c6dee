"""Guards on losses: a loss that jumps, and languages that the model forgets."""

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState

from lola_ft.training.callbacks.alarm import Alarm
from lola_ft.training.callbacks.stop_request import EvaluationStopped, Stopped
from lola_ft.training.reports.metrics import losses_by_language

_WINDOW, _ENOUGH = 50, 10
_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_LEAST = 0.02  # smallest deviation as a share of the median, for a loss that hardly varies


class LossSpike(TrainerCallback):
    """Compares every logged loss with the running median of the losses before it, in robust deviations."""

    def __init__(self, deviations: float, alarm: Alarm) -> None:
        self.deviations, self._alarm = deviations, alarm
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def on_log(self, _args: object, state: TrainerState, _control: object, logs: dict[str, Any], **_: object) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        limit = spike_limit(self._losses, self.deviations)
        median = statistics.median(self._losses) if self._losses else loss
        text = (
            f"the loss is {loss:.4g}, far above {median:.4g}, the median of the {len(self._losses)} losses before it."
        )
        self._alarm.update(state.global_step, "spike", limit is not None and loss > limit, text)
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "alarm": self._alarm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._alarm.load_state_dict(state["alarm"])


class Forgetting(TrainerCallback):
    """Evaluates once before the first step, and compares every later evaluation with it, by language.

    Attributes:
        baseline: Loss by language before training; {} in a run that was started without this guard.
    """

    def __init__(self, evaluate: Callable[[], Any], rise: float, alarm: Alarm) -> None:
        self.baseline: dict[str, float] = {}
        self._evaluate, self.rise, self._alarm = evaluate, rise, alarm

    def on_train_begin(self, _args: object, state: TrainerState, _control: object, **_: object) -> None:
        if state.global_step == 0 and not self.baseline:
            try:
                self._evaluate()
            except EvaluationStopped:
                raise Stopped from None  # nothing was trained yet, so resuming starts from the beginning

    def on_evaluate(
        self, _args: object, state: TrainerState, _control: object, metrics: dict[str, float], **_: object
    ) -> None:
        losses = losses_by_language(metrics)
        if state.global_step == 0:
            self.baseline = losses
        for code, loss in losses.items():
            before = self.baseline.get(code, loss)
            text = (
                f"the validation loss of {code} is {loss:.3f}, {loss - before:.3f} above the {before:.3f} before "
                "training: the model forgets it. Add rows in this language, lower train.learning_rate, or train less."
            )
            self._alarm.update(state.global_step, code, not loss <= before + self.rise, text)  # also warns of NaN

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "alarm": self._alarm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
        self._alarm.load_state_dict(state["alarm"])


def spike_limit(losses: deque[float], deviations: float) -> float | None:
    """Return the limit above which a loss is a spike; None while there are too few losses."""
    if len(losses) < _ENOUGH:
        return None
    median = statistics.median(losses)
    deviation = _TO_DEVIATION * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(deviation, _LEAST * abs(median))
