"""A loss that jumps: far above the running median, measured in robust deviations."""

import statistics
from collections import deque
from typing import Any

from transformers import TrainerCallback

from lola_ft.training.alarm import Alarm

_WINDOW, _ENOUGH = 50, 10
_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_LEAST = 0.02  # of the median: a loss that hardly varies has no deviation to speak of


class LossSpike(TrainerCallback):
    """Compares every logged loss with those before it."""

    def __init__(self, deviations: float, alarm: Alarm) -> None:
        self.deviations, self._alarm = deviations, alarm
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:  # noqa: ARG002
        if "loss" not in logs:
            return
        loss = logs["loss"]
        limit = spike_limit(self._losses, self.deviations)
        median = statistics.median(self._losses) if self._losses else loss
        text = f"the loss is {loss:.4g}, far above the {median:.4g} (median) of the {len(self._losses)} before it."
        self._alarm.update(state.global_step, "spike", limit is not None and loss > limit, text)
        self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "alarm": self._alarm.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._alarm.restore(state["alarm"])


def spike_limit(losses: deque[float], deviations: float) -> float | None:
    """Above this a loss is a spike; None while there are too few to tell."""
    if len(losses) < _ENOUGH:
        return None
    median = statistics.median(losses)
    deviation = _TO_DEVIATION * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(deviation, _LEAST * abs(median))
