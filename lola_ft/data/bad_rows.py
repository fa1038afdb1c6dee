"""Counts and first messages of rows that were skipped because they cannot be used."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lola_ft.data.rows import Source

LISTED = 100
_PLACE = re.compile(r"(.+?)(?=:\d+: |:\[\d+\]: )")
"""The file name in a message, before the line or index."""


@dataclass
class BadRows:
    """The counts of all bad rows by source, and the first messages."""

    counts: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    _first: dict[str, str] = field(default_factory=dict)
    _portable: list[str] = field(default_factory=list)

    def add(self, source: Source, message: str) -> None:
        """Count a row, and keep its message if it is one of the first hundred."""
        self.counts[source.name] += 1
        self._first.setdefault(source.name, message)
        if len(self.messages) < LISTED:
            self.messages.append(message)
            local = source.path is not None
            self._portable.append(_PLACE.sub(lambda place: Path(place[1]).name, message, 1) if local else message)

    def first(self, source: Source) -> str:
        """Return the message of a source's first bad row."""
        return self._first[source.name]

    def stored(self) -> dict[str, Any]:
        """Return everything as plain values, for `restored`."""
        counts = {"counts": dict(self.counts), "messages": self.messages}
        return counts | {"first": self._first, "portable": self._portable}

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> "BadRows":
        """Rebuild the bad rows from what `stored` returned."""
        return cls(Counter(stored["counts"]), stored["messages"], stored["first"], stored["portable"])

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for the manifest. It may be published, so local files are named without their folders."""
        return {"total": self.counts.total(), "messages": self._portable}
