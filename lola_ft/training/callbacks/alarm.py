"""Warnings of guards, printed on the terminal and written as lines of `metrics.jsonl`."""

from typing import Any

from lola_ft.console import Console
from lola_ft.training import processes
from lola_ft.training.reports.metrics import MetricsFile


class Alarm:
    """Warns once when a problem begins, and again only if the problem ended in between.

    Attributes:
        on: The problems that exist at the moment.
    """

    def __init__(self, kind: str, metrics: MetricsFile) -> None:
        self.kind, self._metrics = kind, metrics
        self.on: set[str] = set()

    def update(self, step: int, what: str, happens: bool, text: str) -> bool:
        """Warn if a problem begins now; returns True if it does."""
        begins = happens and what not in self.on
        if begins:
            self.on.add(what)
            self._metrics.write(step, {"warning": self.kind, "message": text})
            Console(stderr=True, quiet=not processes.is_main()).print(f"\nStep {step}: {text}")
        elif not happens:
            self.on.discard(what)
        return begins

    def state_dict(self) -> dict[str, Any]:
        return {"on": sorted(self.on)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on = set(state["on"])
