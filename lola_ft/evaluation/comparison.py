"""Several models side by side on the same rows, by language."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lola_ft.evaluation.bootstrap import Estimate, Floats, Value, bootstrap
from lola_ft.evaluation.task import Measure, Measured

ALL = "all"
"""What the rows of all languages together are called."""


@dataclass(frozen=True)
class Line:
    """A language's rows: each model's value, and its difference to the first model."""

    rows: int
    values: list[Estimate]
    differences: list[Estimate]


@dataclass(frozen=True)
class Comparison:
    """Every measure's values by language; `ALL` comes first where there are several languages.

    Attributes:
        models: The models' names.
    """

    models: list[str]
    measures: Mapping[str, Measure]
    lines: Mapping[str, Mapping[str, Line]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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
    """Estimate every measure for every language.

    Args:
        measured: Of each model, on the same rows.
        languages: Each row's.
    """
    codes = np.array(languages)
    groups = {code: np.flatnonzero(codes == code) for code in sorted(set(languages))}
    if len(groups) > 1:
        groups = {ALL: np.arange(len(codes)), **groups}
    lines = {
        name: {
            code: _line([one.parts[name][rows] for one in measured], measure.value, resamples, seed, code)
            for code, rows in groups.items()
        }
        for name, measure in measures.items()
    }
    return Comparison(list(models), measures, lines)


def _line(parts: list[Floats], value: Value, resamples: int, seed: int, code: str) -> Line:
    """A language draws its own rows, whichever others there are."""
    values, differences = bootstrap(parts, value, resamples, seed + zlib.crc32(code.encode()))
    return Line(len(parts[0]), values, differences)
