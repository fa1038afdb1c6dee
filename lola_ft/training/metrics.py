"""What a run writes down while it goes: `metrics.jsonl`, and the loss curve at the end."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_RENAMED = {"train_loss": "mean_loss"}


class MetricsFile(TrainerCallback):
    """Appends one JSON object for each log line to `metrics.jsonl`, readable while the run goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainer: Any = None  # set once the trainer exists; it counts the tokens
        self._last = (0, time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._last = (self.trainer.tokens_seen, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"step": state.global_step}
        line |= {
            _RENAMED.get(key, key): round(value, 6) for key, value in logs.items() if isinstance(value, int | float)
        }
        if "learning_rate" in logs:
            line["learning_rate"] = logs["learning_rate"]
        if "loss" in logs:
            now = (self.trainer.tokens_seen, time.perf_counter())
            line["tokens_per_s"] = round((now[0] - self._last[0]) / max(now[1] - self._last[1], 1e-9), 1)
            line["tokens"] = now[0]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._last = (self.trainer.tokens_seen, time.perf_counter())  # time of an evaluation is not training time


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss(metrics: list[dict[str, Any]], path: Path, label_of_loss: str = "loss (nats a trained token)") -> None:
    """Draw training and validation loss over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label_of_loss)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
