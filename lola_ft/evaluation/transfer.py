"""The transfer matrix: the effect of training on one language on other languages, as changes in bits per byte."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lola_ft.errors import UserError
from lola_ft.evaluation.comparison import Comparison, pyplot, shown
from lola_ft.file_names import MANIFEST_FILE

MEASURE = "bits_per_byte"
_NAMED = 3
_UPRIGHT = 6  # characters of a language's name that fit under a column of the picture


def trained_languages(run: str) -> list[str]:
    """Return the languages of a run's training from its manifest, those with most tokens first."""
    file = Path(run) / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"--transfer needs a base, then runs; {run} has no {MANIFEST_FILE} that lists its languages.")
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))["data"]["train"]["languages"]
        return sorted(counts, key=lambda code: (-counts[code]["trained_tokens"], code))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: does not list the languages of the run's training ({error!r}).") from error


def transfer_rows(models: Sequence[str]) -> dict[str, list[str]]:
    """Return the languages of every run after the base."""
    if len(models) < 2:
        raise UserError("--transfer compares runs with their base: give the base first, then at least one run.")
    return {run: trained_languages(run) for run in models[1:]}


def transfer_table(comparison: Comparison, trained: dict[str, list[str]]) -> Table:
    """Make a table with one line per run and one column per tested language."""
    tested = comparison.lines[MEASURE]
    table = Table(title="Change in bits per byte, trained × tested (below zero is better)", title_justify="left")
    for heading in ("trained on", "run"):
        table.add_column(heading, overflow="fold")
    for language in tested:
        table.add_column(Text(language), justify="right")
    for place, (run, languages) in enumerate(trained.items(), start=1):
        cells = (shown(line.differences[place], percent=False, signed=True) for line in tested.values())
        table.add_row(Text(few(languages)), Text(run), *cells)
    return table


def transfer_dict(comparison: Comparison, trained: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return the matrix for JSON: per run its languages and the changes."""
    return [
        {
            "run": run,
            "trained": languages,
            "change": {tested: line.differences[place].as_dict() for tested, line in comparison.lines[MEASURE].items()},
        }
        for place, (run, languages) in enumerate(trained.items(), start=1)
    ]


def plot_transfer(comparison: Comparison, trained: dict[str, list[str]], path: Path) -> None:
    """Draw the matrix: blue is better than the base, red worse; a star marks an interval that excludes zero."""
    plt = pyplot()
    tested = comparison.lines[MEASURE]
    changes = np.array(
        [[line.differences[place].value for line in tested.values()] for place in range(1, len(trained) + 1)]
    )
    limit = float(np.nanmax(np.abs(changes))) or 1.0
    size = (2.5 + 0.75 * len(tested), 1.6 + 0.5 * len(trained))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(changes, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(changes.shape):
        difference = list(tested.values())[column].differences[row + 1]
        star = "*" if difference.beyond_zero else ""
        dark = abs(changes[row, column]) > 0.6 * limit
        axes.text(
            column, row, f"{changes[row, column]:+.2f}{star}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    long = max(map(len, tested)) > _UPRIGHT
    axes.set_xticks(range(len(tested)), tested, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(len(trained)), [few(languages) for languages in trained.values()])
    axes.set_xlabel("tested on")
    axes.set_ylabel("trained on")
    figure.colorbar(image, label="change in bits per byte")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def few(languages: list[str]) -> str:
    """Name the first languages, and count the rest."""
    rest = len(languages) - _NAMED
    return ", ".join(languages[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
