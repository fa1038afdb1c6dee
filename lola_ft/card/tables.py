"""Tables of a card in Markdown. A long table is folded, and its largest and smallest rows are shown above it."""

from collections.abc import Sequence

LONGEST_OPEN = 30
"""Most rows of a table that is shown whole."""
SHOWN = 10
"""Rows shown of each end of a longer table."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table; with `numbers`, all columns except the first are aligned to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def table_of_languages(
    header: Sequence[str], rows: Sequence[Sequence[str]], sizes: Sequence[float | None], by: str
) -> str:
    """Return a table with one row per language. A long table shows the extremes and folds the whole.

    Args:
        sizes: Per row, the number that decides which rows are the largest. A row with None is only in the folded
            table.
        by: The meaning of `sizes`, such as "trained tokens".
    """
    if len(rows) <= LONGEST_OPEN:
        return table(header, rows, numbers=True)
    known = [(size, row) for size, row in zip(sizes, rows, strict=True) if size is not None]
    ordered = [row for _, row in sorted(known, key=lambda pair: -pair[0])]
    largest, smallest = ordered[:SHOWN], ordered[max(SHOWN, len(ordered) - SHOWN) :]
    extremes = [
        f"{which} {len(some)} by {by}:\n\n{table(header, some, numbers=True)}"
        for which, some in (("Largest", largest), ("Smallest", smallest))
        if some
    ]
    return "\n\n".join([*extremes, folded(f"All {len(rows)} languages", table(header, rows, numbers=True))])


def folded(title: str, text: str) -> str:
    """Return text folded under a title. The blank lines make GitHub and the Hub read the inside as Markdown."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
