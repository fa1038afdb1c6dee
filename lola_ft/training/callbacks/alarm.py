"""Warnings of a guard: on the terminal, and as lines of `metrics.jsonl`. Used by several guards."""

from typing import Any

from lola_ft.console import Console
from lola_ft.training import processes
from lola_ft.training.reports.metrics import MetricsFile


class Alarm:
    """Warns once: when something begins, and again only after it was over.

    Attributes:
        on: The things that go on at the moment.
    """

    def __init__(self, kind: str, metrics: MetricsFile) -> None:
        self.kind, self._metrics = kind, metrics
        self.on: set[str] = set()

    def update(self, step: int, what: str, happens: bool, text: str) -> bool:
        """Warn if something begins now; returns whether it did."""
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
