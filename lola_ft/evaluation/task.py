"""Tasks and measures. A task asks a model about rows; a measure is a function of sums over rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lola_ft.data import PromptTemplate
from lola_ft.evaluation.bootstrap import Floats, Value
from lola_ft.open_model import OpenModel


@dataclass(frozen=True)
class Measure:
    """One number that a task measures.

    Attributes:
        value: The function from the rows' summed parts to the number.
        percent: Shown as a percentage.
        lower_is_better: Noted in the title, for the reader.
        digits: Digits after the point, if it is not a percentage.
    """

    title: str
    value: Value
    percent: bool = False
    lower_is_better: bool = False
    digits: int = 3


@dataclass(frozen=True)
class Measured:
    """The result of one model on all rows.

    Attributes:
        parts: Per measure's name, the contributions of each row (rows, parts).
        rows: Per row, the values to write to the file of rows.
    """

    parts: Mapping[str, Floats]
    rows: list[dict[str, Any]]


class Task(Protocol):
    """A task, which has its rows from its construction."""

    name: str
    measures: Mapping[str, Measure]
    languages: list[str]
    """Each row's language."""
    places: list[str]
    """Each row's place (`file:line`)."""

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Ask a model about every row."""
