"""`metrics.jsonl`, the file that a run appends to during training, and the names in it.

A key `a/b` of a log line becomes the key b in an object a, so that all languages or layers share one object.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from lola_ft.errors import UserError
from lola_ft.training import processes
from lola_ft.training.run_state import RunState

BY_LANGUAGE = "eval_loss_by_language"
ENTROPY, SHARE, DEAD = "router_load_entropy", "router_largest_share", "router_dead_experts"
FLIP_RATE = "router_flip_rate"
_RENAMED = {"train_loss": "mean_loss"}
_OBJECTS = (BY_LANGUAGE, "router_")


class MetricsFile(TrainerCallback):
    """Appends one JSON object per log line to `metrics.jsonl`, which can be read during the run.

    A number that is not finite is written as null, because JSON has no such number.
    """

    def __init__(self, path: Path, run: RunState | None = None) -> None:
        self.path, self._run = path, run or RunState()
        self._last = (0, time.perf_counter())

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._last = (self._run.tokens_seen, time.perf_counter())

    def on_log(self, _args: object, state: TrainerState, _control: object, logs: dict[str, Any], **_: object) -> None:
        line: dict[str, Any] = {}
        for key, value in logs.items():
            if isinstance(value, int | float):
                _put(line, _RENAMED.get(key, key), round(value, 6) if math.isfinite(value) else None)
        if "learning_rate" in logs:
            line["learning_rate"] = logs["learning_rate"]
        if "loss" in logs:
            now = (self._run.tokens_seen, time.perf_counter())
            line["tokens_per_s"] = round((now[0] - self._last[0]) / max(now[1] - self._last[1], 1e-9), 1)
            line["tokens"] = now[0]
        self.write(state.global_step, line)

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Append a line, only in the main process; raises UserError if it cannot be written."""
        if not processes.is_main():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: step {step} could not be written ({error.strerror}). Checkpoints are unchanged. Make "
                "room or give permission, then go on with --resume."
            ) from error

    def on_evaluate(self, *_: object, **__: object) -> None:
        self._last = (
            self._run.tokens_seen,
            time.perf_counter(),
        )  # leaves the time of the evaluation out of tokens_per_s


def _put(line: dict[str, Any], key: str, value: float | None) -> None:
    """Put a value under its key; a key `a/b` of a language or layer becomes the key b in the object a."""
    outer, _, inner = key.partition("/")
    if inner and outer.startswith(_OBJECTS):
        line.setdefault(outer, {})[inner] = value
    else:
        line[key] = value


def first_and_last(metrics: list[dict[str, Any]], key: str) -> tuple[float, float] | None:
    """Return a number's first and last known value; None if it is in no line."""
    values = [line[key] for line in metrics if line.get(key) is not None]
    return (values[0], values[-1]) if values else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses_by_language(metrics: dict[str, float]) -> dict[str, float]:
    """Return the losses in an evaluation's metrics, by language code."""
    return {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{BY_LANGUAGE}/")}
