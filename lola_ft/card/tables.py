"""Tables of a card in Markdown; a long one is folded, its largest and smallest rows shown first."""

from collections.abc import Sequence

LONGEST_OPEN = 30
"""Rows of the longest table that is shown whole."""
SHOWN = 10
"""Rows shown at each end of a longer one."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table; with `numbers`, all columns but the first are aligned to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def table_of_languages(
    header: Sequence[str], rows: Sequence[Sequence[str]], sizes: Sequence[float | None], by: str
) -> str:
    """Return a table with a row for each language; a long one shows the extremes and folds the whole.

    Args:
        sizes: For each row, the number that decides which rows are the largest; None for a language without it,
            which is only in the folded table.
        by: What `sizes` are, such as "trained tokens".
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
    """Return Markdown that opens by a click. The blank lines inside make GitHub and the Hub read it as Markdown."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
