"""Everything a run has counted and must remember, in one object that the trainer and its callbacks share."""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lola_ft.training import processes
from lola_ft.training.callbacks.best_evaluation import BestEvaluation
from lola_ft.training.callbacks.stop_request import StopRequest


class Stateful(Protocol):
    """Something with a state of its own, which decides what the next steps do or write."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class RunState:
    """The state of a run beside transformers' own `TrainerState`; checkpoints hold it.

    Attributes:
        stop: Says whether the run was asked to stop.
        tokens_seen: Tokens of all training batches of all processes, without padding; counted after each step.
        own_tokens: This process's tokens since the last step; on the device, which is not waited for before the end.
        evaluation_due: An evaluation was left because the run was asked to stop; it is done on resuming.
        extensions: Changes of the run's length, oldest first: the `step` at which it went from so many steps to
            so many (`from`, `to`), and what became of the `schedule`.
        best: Follows the evaluations, if the recipe wants to know the best.
        kept: By name, everything else with a state that checkpoints hold, such as guards.
    """

    stop: StopRequest = field(default_factory=StopRequest)
    tokens_seen: int = 0
    own_tokens: int | Tensor = 0
    evaluation_due: bool = False
    extensions: list[dict[str, Any]] = field(default_factory=list)
    best: BestEvaluation | None = None
    kept: dict[str, Stateful] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _seconds_before: float = 0.0

    @property
    def train_seconds(self) -> float:
        """Time spent in training, the time before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def begin(self) -> None:
        """Start the clock of training."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """Add what all processes have trained on since the last step."""
        self.tokens_seen += processes.total(int(self.own_tokens))
        self.own_tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint keeps of it."""
        return {
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "evaluation_due": self.evaluation_due,
            "extensions": self.extensions,
            "kept": {name: thing.state_dict() for name, thing in self.kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's values back, but for the extensions, which the schedule needs before.

        What this run does not keep is left out.
        """
        self.tokens_seen, self._seconds_before = state["tokens_seen"], state["train_seconds"]
        self.evaluation_due = state["evaluation_due"]
        for name, stored in state.get("kept", {}).items():
            if name in self.kept:
                self.kept[name].load_state_dict(stored)
