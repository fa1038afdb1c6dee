"""The comparison of several models on the same rows, by language: numbers, tables and a plot."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lola_ft.console import shown_progress
from lola_ft.evaluation.bootstrap import Estimate, bootstrap
from lola_ft.evaluation.task import Measure, Measured

ALL = "all"
"""The name of the rows of all languages together."""
NOTE = (
    "In brackets: 95 % bootstrap intervals over rows. * marks a difference to the first model whose interval excludes "
    "zero."
)


@dataclass(frozen=True)
class Line:
    """The results of one language: each model's value, and its difference to the first model."""

    rows: int
    values: list[Estimate]
    differences: list[Estimate]


@dataclass(frozen=True)
class Comparison:
    """Every measure's values by language. With several languages, `ALL` comes first.

    Attributes:
        models: The models' names.
    """

    models: list[str]
    measures: Mapping[str, Measure]
    lines: Mapping[str, Mapping[str, Line]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            name: {
                language: {
                    "rows": line.rows,
                    "models": {
                        model: value.as_dict() | ({"difference": difference.as_dict()} if place else {})
                        for place, (model, value, difference) in enumerate(
                            zip(self.models, line.values, line.differences, strict=True)
                        )
                    },
                }
                for language, line in lines.items()
            }
            for name, lines in self.lines.items()
        }


def compare(
    models: Sequence[str],
    measured: Sequence[Measured],
    measures: Mapping[str, Measure],
    languages: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Estimate every measure for every language, from the models' measurements on the same rows."""
    codes = np.array(languages)
    groups = {code: np.flatnonzero(codes == code) for code in sorted(set(languages))}
    if len(groups) > 1:
        groups = {ALL: np.arange(len(codes)), **groups}
    lines: dict[str, dict[str, Line]] = {name: {} for name in measures}
    with shown_progress("Estimating intervals", len(measures) * len(groups)) as advance:
        for name, measure in measures.items():
            for code, rows in groups.items():
                parts = [one.parts[name][rows] for one in measured]
                own_seed = seed + zlib.crc32(
                    code.encode()
                )  # a language's resamples do not depend on the other languages
                lines[name][code] = Line(len(rows), *bootstrap(parts, measure.value, resamples, own_seed))
                advance(1)
    return Comparison(list(models), measures, lines)


def tables(comparison: Comparison) -> Iterator[Table]:
    """Yield one table per measure, with one line per language and each model's difference to the first model."""
    for name, measure in comparison.measures.items():
        better = ", lower is better" if measure.lower_is_better else ""
        table = Table(title=f"{measure.title}{better}", title_justify="left")
        table.add_column("language")
        table.add_column("rows", justify="right")
        for place, model in enumerate(comparison.models):
            table.add_column(Text(model), justify="right", overflow="fold")
            if place:
                table.add_column("difference", justify="right")
        for language, line in comparison.lines[name].items():
            table.add_row(Text(language), f"{line.rows:,}", *_cells(line, measure))
            if language == ALL:
                table.add_section()
        yield table


def _cells(line: Line, measure: Measure) -> Iterator[str]:
    for place, (value, difference) in enumerate(zip(line.values, line.differences, strict=True)):
        yield shown(value, measure.percent, digits=measure.digits)
        if place:
            yield shown(difference, measure.percent, signed=True, digits=measure.digits)


def shown(estimate: Estimate, percent: bool, signed: bool = False, digits: int = 3) -> str:
    """Return a value and its interval as text, `1.234 [1.201 to 1.267]`; a signed value may get a star (not zero)."""
    if isnan(estimate.value):
        return "–"
    scale, digits = (100, 1) if percent else (1, digits)
    unit = "%" if percent and not signed else ""
    value, low, high = (
        f"{scale * number:{'+' if signed else ''}.{digits}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    star = "*" if signed and estimate.beyond_zero else ""
    return f"{value}{unit}" if isnan(estimate.low) else f"{value}{unit} \\[{low} to {high}]{star}"


def plot(comparison: Comparison, path: Path) -> None:
    """Draw one panel per measure, with the languages from top to bottom."""
    plt = pyplot()
    measures = list(comparison.measures.items())
    languages = list(comparison.lines[measures[0][0]])
    height = 1.8 + 0.28 * len(languages) * max(1, 0.5 * len(comparison.models))
    figure, panels = plt.subplots(
        1, len(measures), figsize=(4.2 * len(measures) + 1, height), layout="constrained", squeeze=False, sharey=True
    )
    rows = np.arange(len(languages))
    shifts = (np.arange(len(comparison.models)) - (len(comparison.models) - 1) / 2) * 0.7 / len(comparison.models)
    for axes, (name, measure) in zip(panels[0], measures, strict=True):
        scale = 100 if measure.percent else 1
        for place, (model, shift) in enumerate(zip(comparison.models, shifts, strict=True)):
            found = [line.values[place] for line in comparison.lines[name].values()]
            values, low, high = (
                scale * np.array([getattr(one, key) for one in found]) for key in ("value", "low", "high")
            )
            errors = np.nan_to_num(np.clip([values - low, high - values], 0, None))
            axes.errorbar(values, rows + shift, xerr=errors, fmt="o", markersize=4, capsize=2, label=model)
        axes.set_xlabel(f"{measure.title}{' (%)' if measure.percent else ''}")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(rows, languages)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to work without a window."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
