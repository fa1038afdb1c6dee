"""What a guard has to say: on the terminal, and as a line of `metrics.jsonl`."""

from typing import Any

from rich.console import Console

from lola_ft.training import processes
from lola_ft.training.metrics import MetricsFile


class Alarm:
    """Says something once: when it begins, and again only after it was over.

    Attributes:
        on: What goes on at the moment.
    """

    def __init__(self, kind: str, metrics: MetricsFile) -> None:
        self.kind, self._metrics = kind, metrics
        self.on: set[str] = set()

    def update(self, step: int, what: str, happens: bool, text: str) -> bool:
        """Whether it was said now."""
        begins = happens and what not in self.on
        if begins:
            self.on.add(what)
            self._metrics.write(step, {"warning": self.kind, "message": text})
            Console(stderr=True, quiet=not processes.is_main()).print(
                f"\nStep {step}: {text}", markup=False, highlight=False, soft_wrap=True
            )
        elif not happens:
            self.on.discard(what)
        return begins

    def state(self) -> dict[str, Any]:
        return {"on": sorted(self.on)}

    def restore(self, state: dict[str, Any]) -> None:
        self.on = set(state["on"])
