"""The cost of the reference of dpo and kto, computed before the first step or beside the steps."""

from dataclasses import asdict, dataclass
from typing import Any

from lola_ft.planning.sizes import show_size

_ROW = 2 * 4  # two float32 numbers per row: for both answers of a pair, or for an answer and the one swapped in


@dataclass(frozen=True)
class ReferencePasses:
    """The costs of the reference in a run, for both ways of computing it.

    Attributes:
        before: Rows that the reference reads before the first step, each row once. None if the data was not read.
        beside: Rows that it reads during steps and evaluations, each row as often as it is used.
        copy_bytes: Bytes of the frozen copy of the starting adapter, needed only beside the steps; 0 if the reference
            is the base.
    """

    before: int | None
    beside: int | None
    copy_bytes: int

    @property
    def cheaper(self) -> str | None:
        """`before` or `beside`; None if that depends on data that was not read.

        `before` never reads more rows. If both read the same number, `beside` compares within the same micro batch.
        """
        if self.copy_bytes:
            return "before"
        if self.before is None or self.beside is None:
            return None
        return "before" if self.before < self.beside else "beside"

    def line(self, chosen: str | None) -> str:
        """Return a sentence with both costs and the chosen way."""
        kept, copy = show_size(_ROW * (self.before or 0)), show_size(self.copy_bytes)
        before = "each row once" if self.before is None else f"{self.before:,} rows, {kept} kept"
        beside = "each row as often as it is used" if self.beside is None else f"{self.beside:,} rows"
        memory = f" and {copy} for a frozen copy of the adapter" if self.copy_bytes else ""
        ways = {"before": "before the first step", "beside": "beside the steps", None: "the cheaper way"}
        return (
            f"The reference is computed {ways[chosen]}. Before the first step it reads {before}; beside the steps "
            f"{beside}{memory}. To choose, set train.reference_pass."
        )

    def as_dict(self, chosen: str | None) -> dict[str, Any]:
        """Return both costs and the chosen way, for JSON."""
        return {"chosen": chosen, **asdict(self)}


def reference_passes(
    rows: int, seen: int, validation_rows: int, evaluations: int, copy_bytes: int = 0
) -> ReferencePasses:
    """Count the rows that the reference reads.

    Args:
        rows: Rows of an epoch.
        seen: Rows of all steps together, each counted as often as it is trained on.
        evaluations: Number of evaluations, each of all validation rows.
    """
    once = min(rows, seen) + (validation_rows if evaluations else 0)
    return ReferencePasses(once, seen + evaluations * validation_rows, copy_bytes)
