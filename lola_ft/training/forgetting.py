"""Whether training on some languages makes the model worse in others: their validation losses against the start's."""

from typing import Any

from transformers import TrainerCallback

from lola_ft.training.alarm import Alarm
from lola_ft.training.by_language import BY_LANGUAGE
from lola_ft.training.stopping import EvaluationStopped, Stopped


class Forgetting(TrainerCallback):
    """Evaluates once before the first step, then watches every evaluation.

    Attributes:
        baseline: Loss by language before training; {} in a run that was started without this guard.
    """

    def __init__(self, trainer: Any, rise: float, alarm: Alarm) -> None:
        self.baseline: dict[str, float] = {}
        self._trainer, self.rise, self._alarm = trainer, rise, alarm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == 0 and not self.baseline:
            try:
                self._trainer.evaluate()
            except EvaluationStopped:
                raise Stopped from None  # nothing is trained yet: the run starts again from its beginning

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        losses = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{BY_LANGUAGE}/")}
        if state.global_step == 0:
            self.baseline = losses
        for code, loss in losses.items():
            before = self.baseline.get(code, loss)
            text = (
                f"the validation loss of {code} is {loss:.3f}, {loss - before:.3f} above the {before:.3f} before "
                "training: the model forgets it. Mix in rows of it, lower train.learning_rate, or train less."
            )
            self._alarm.update(state.global_step, code, not loss <= before + self.rise, text)  # NaN, too

    def state(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "alarm": self._alarm.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
        self._alarm.restore(state["alarm"])
