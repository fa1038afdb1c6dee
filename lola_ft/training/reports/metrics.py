"""`metrics.jsonl`, the file that a run appends to while it goes, and the names in it.

`a/b` in a log line becomes b within a in the file: one object for all languages, or for all layers.
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
    """Appends one JSON object for each log line to `metrics.jsonl`, readable while the run goes.

    A number that is not finite is written as null: JSON has no other word for it.
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
        """Append a line, in the main process only; raises UserError if the disk does not take it."""
        if not processes.is_main():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: step {step} could not be written ({error.strerror}). Checkpoints are as they were. Make "
                "room or give permission, then go on with --resume."
            ) from error

    def on_evaluate(self, *_: object, **__: object) -> None:
        self._last = (self._run.tokens_seen, time.perf_counter())  # time of an evaluation is not training time


def _put(line: dict[str, Any], key: str, value: float | None) -> None:
    """Put a value under its key; `a/b` of languages and layers becomes b within a, one object for all of them."""
    outer, _, inner = key.partition("/")
    if inner and outer.startswith(_OBJECTS):
        line.setdefault(outer, {})[inner] = value
    else:
        line[key] = value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses_by_language(metrics: dict[str, float]) -> dict[str, float]:
    """Return the losses of an evaluation's metrics by language code."""
    return {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{BY_LANGUAGE}/")}
