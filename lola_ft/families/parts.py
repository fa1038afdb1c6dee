"""Parameters and bytes by part and format, counted on a loaded model (`quantization/audit.py`) or planned."""

from collections import defaultdict
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

PARTS = (
    *("embeddings", "attention", "dense mlp", "shared experts", "experts", "router", "norms", "head", "other"),
    *("adapter", "biases"),
)
_PART_OF_GROUP = {"mlp": "dense mlp", "shared_experts": "shared experts"}


@dataclass
class Count:
    """A number of parameters (a 4-bit weight counts its original values) and the bytes that they take."""

    parameters: int = 0
    num_bytes: int = 0


@dataclass
class Audit:
    """Counts by (part, format), for instance ("experts", "nf4") or ("norms", "bfloat16")."""

    counts: dict[tuple[str, str], Count] = field(default_factory=lambda: defaultdict(Count))

    @property
    def total_bytes(self) -> int:
        return sum(count.num_bytes for count in self.counts.values())

    @property
    def total_parameters(self) -> int:
        return sum(count.parameters for count in self.counts.values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return `{"experts nf4": {"parameters": …, "bytes": …}, …}` for the manifest."""
        return {
            f"{part} {kind}": {"parameters": count.parameters, "bytes": count.num_bytes}
            for (part, kind), count in self._sorted()
        }

    def table(self, title: str) -> Table:
        table = Table(title=Text(title), title_justify="left")
        for heading in ("part", "format"):
            table.add_column(heading)
        for heading in ("parameters", "bytes"):
            table.add_column(heading, justify="right")
        for (part, kind), count in self._sorted():
            table.add_row(part, kind, f"{count.parameters:,}", f"{count.num_bytes:,}")
        table.add_section()
        table.add_row("all", "", f"{self.total_parameters:,}", f"{self.total_bytes:,}")
        return table

    def _sorted(self) -> list[tuple[tuple[str, str], Count]]:
        return sorted(self.counts.items(), key=lambda item: (PARTS.index(item[0][0]), item[0][1]))


def part_of_group(group: str) -> str:
    """Return the name under which a group of weights is counted."""
    return _PART_OF_GROUP.get(group, group)
