"""Tasks and measures: a task asks a model about rows; each measure is a function of sums over rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lola_ft.data import PromptTemplate
from lola_ft.evaluation.bootstrap import Floats, Value
from lola_ft.open_model import OpenModel


@dataclass(frozen=True)
class Measure:
    """One number that a task gives.

    Attributes:
        value: From the rows' summed parts.
        percent: Shown as a percentage.
        lower_is_better: For the reader.
        digits: Shown after the point, where it is no percentage.
    """

    title: str
    value: Value
    percent: bool = False
    lower_is_better: bool = False
    digits: int = 3


@dataclass(frozen=True)
class Measured:
    """Result of one model on all rows.

    Attributes:
        parts: For each measure by its name, what each row contributes (rows, parts).
        rows: For each row, what is worth writing down.
    """

    parts: Mapping[str, Floats]
    rows: list[dict[str, Any]]


class Task(Protocol):
    """A way to ask. Rows have been given to it when it was made."""

    name: str
    measures: Mapping[str, Measure]
    languages: list[str]
    """Each row's language."""
    places: list[str]
    """Where each row came from."""

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Ask a model about every row."""
