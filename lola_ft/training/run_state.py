"""The counts and other state of a run, in one object that the trainer and its callbacks share."""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lola_ft.training import processes
from lola_ft.training.callbacks.best_evaluation import BestEvaluation
from lola_ft.training.callbacks.stop_request import StopRequest


class Stateful(Protocol):
    """An object with a state that affects what the next steps compute or write."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class RunState:
    """The state of a run beyond transformers' `TrainerState`. Checkpoints store it.

    Attributes:
        stop: Tells whether the run was asked to stop.
        tokens_seen: Tokens of all training batches of all processes, without padding; counted after each step.
        own_tokens: This process's tokens since the last step; a tensor on the device, which is read only at the step's
            end, so that micro batches do not wait for it.
        evaluation_due: An evaluation was interrupted by a stop request; it is done on resuming.
        extensions: Changes of the run's length, oldest first. Each has the `step` of the change, the number of steps
            before (`from`) and after (`to`), and the `schedule` (`stretch` or `restart`).
        best: Tracks the best evaluation, if the recipe needs it.
        kept: All other objects with a state that checkpoints store, such as guards, by name.
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
        """Seconds spent in training, including the time before a resume."""
        return self._seconds_before + time.perf_counter() - self._began

    def begin(self) -> None:
        """Start the clock of training."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """Add the tokens that all processes have trained on since the last step."""
        self.tokens_seen += processes.total(int(self.own_tokens))
        self.own_tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores."""
        return {
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "evaluation_due": self.evaluation_due,
            "extensions": self.extensions,
            "kept": {name: thing.state_dict() for name, thing in self.kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's values, except the extensions, which the scheduler restores earlier.

        Stored states of objects that this run does not have, such as guards switched off, are ignored.
        """
        self.tokens_seen, self._seconds_before = state["tokens_seen"], state["train_seconds"]
        self.evaluation_due = state["evaluation_due"]
        for name, stored in state.get("kept", {}).items():
            if name in self.kept:
                self.kept[name].load_state_dict(stored)
