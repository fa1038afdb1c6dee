"""What the reference of preferences costs: log-probabilities computed before the first step, or beside the steps."""

from dataclasses import asdict, dataclass
from typing import Any

from lola_ft.planning.sizes import show_size

_ROW = 2 * 4  # two float32 numbers: of both answers of a pair; of an answer and of the one it is exchanged for


@dataclass(frozen=True)
class ReferencePasses:
    """The reference's costs in a run, as far as they depend on when it is computed.

    Attributes:
        before: Rows that it reads before the first step: each row of the run once. None if the data was not read.
        beside: Rows that it reads beside the steps and in evaluations: each row as often as it is seen.
        copy_bytes: Size of the frozen copy of the starting adapter, which only the way beside the steps needs; 0 where
            the reference is the base.
    """

    before: int | None
    beside: int | None
    copy_bytes: int

    @property
    def cheaper(self) -> str | None:
        """`before` or `beside`; None if that depends on data that was not read.

        `before` never reads more rows. Where both cost the same, `beside` compares numbers of the same micro batch.
        """
        if self.copy_bytes:
            return "before"
        if self.before is None or self.beside is None:
            return None
        return "before" if self.before < self.beside else "beside"

    def line(self, chosen: str | None) -> str:
        """Say both costs, and which way is chosen."""
        kept, copy = show_size(_ROW * (self.before or 0)), show_size(self.copy_bytes)
        before = "each row once" if self.before is None else f"{self.before:,} rows, {kept} kept"
        beside = "each row as often as it is seen" if self.beside is None else f"{self.beside:,} rows"
        memory = f" and {copy} for a frozen copy of the adapter" if self.copy_bytes else ""
        ways = {"before": "before the first step", "beside": "beside the steps", None: "the cheaper way"}
        return (
            f"The reference is computed {ways[chosen]}. Before the first step it reads {before}; beside the steps "
            f"{beside}{memory}. train.reference_pass chooses."
        )

    def as_dict(self, chosen: str | None) -> dict[str, Any]:
        """Return both costs and the chosen way, for JSON."""
        return {"chosen": chosen, **asdict(self)}


def reference_passes(
    rows: int, seen: int, validation_rows: int, evaluations: int, copy_bytes: int = 0
) -> ReferencePasses:
    """Count the rows that the reference reads.

    Args:
        rows: Of an epoch.
        seen: Rows of all steps together, each as often as it is trained on.
        evaluations: Of all validation rows.
    """
    once = min(rows, seen) + (validation_rows if evaluations else 0)
    return ReferencePasses(once, seen + evaluations * validation_rows, copy_bytes)
