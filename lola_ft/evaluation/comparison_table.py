"""The comparison as tables, one a measure."""

from collections.abc import Iterator
from math import isnan

from rich.table import Table
from rich.text import Text

from lola_ft.evaluation.bootstrap import Estimate
from lola_ft.evaluation.comparison import ALL, Comparison, Line
from lola_ft.evaluation.task import Measure

NOTE = (
    "In brackets 95 % bootstrap intervals over rows; * a difference to the first model whose interval leaves out zero."
)


def tables(comparison: Comparison) -> Iterator[Table]:
    """A table for each measure: a line for each language, the difference to the first model beside each other one."""
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
            yield shown(difference, measure.percent, signed=True, digits=measure.digits) + (
                "*" if difference.beyond_zero else ""
            )


def shown(estimate: Estimate, percent: bool, signed: bool = False, digits: int = 3) -> str:
    """A value and its interval, such as `1.234 [1.201 to 1.267]`; a single row has none."""
    if isnan(estimate.value):
        return "–"
    scale, digits = (100, 1) if percent else (1, digits)
    unit = "%" if percent and not signed else ""
    value, low, high = (
        f"{scale * number:{'+' if signed else ''}.{digits}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value}{unit}" if isnan(estimate.low) else f"{value}{unit} \\[{low} to {high}]"
