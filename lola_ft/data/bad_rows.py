"""Rows that were skipped because they cannot be used: how many, and the messages that a person would want to see."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

LISTED = 100


@dataclass
class BadRows:
    """Counts by source, all of them, and the first messages."""

    counts: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    _first: dict[str, str] = field(default_factory=dict)

    def add(self, source: str, message: str) -> None:
        """Count a row; its message is kept while there are fewer than a hundred."""
        self.counts[source] += 1
        self._first.setdefault(source, message)
        if len(self.messages) < LISTED:
            self.messages.append(message)

    def first(self, source: str) -> str:
        """The message of a source's first bad row."""
        return self._first[source]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"total": self.counts.total(), "sources": dict(self.counts), "messages": self.messages}
