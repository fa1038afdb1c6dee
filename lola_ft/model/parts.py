"""What a model takes, by part and by format: counted on a loaded model (`quantization/audit.py`) or planned."""

from collections import defaultdict
from dataclasses import dataclass, field

from rich.table import Table

PARTS = ("embeddings", "attention", "dense mlp", "experts", "router", "norms", "head", "adapter", "biases")


@dataclass
class Count:
    """Logical parameters (a 4-bit weight counts as what it stands for) and the bytes they take."""

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
        """`{"experts nf4": {"parameters": …, "bytes": …}, …}` for the manifest."""
        return {
            f"{part} {kind}": {"parameters": count.parameters, "bytes": count.num_bytes}
            for (part, kind), count in self._sorted()
        }

    def table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
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


def part_of(name: str) -> str:
    """The part that a parameter or buffer belongs to, by its name in the model."""
    if "lora_" in name:
        return "adapter"
    if ".trained_bias." in name:
        return "biases"
    if name.startswith("score."):
        return "head"
    if ".moe.gate" in name:
        return "adapter" if "modules_to_save" in name else "router"
    return next((part for marker, part in _MARKERS if marker in name), "embeddings")


_MARKERS = (
    (".attn", "attention"),
    (".self_attention", "attention"),  # BLOOM's names (baseline/families.py)
    (".mlp", "dense mlp"),
    (".experts", "experts"),
    (".ln_", "norms"),
    ("layernorm", "norms"),
)
