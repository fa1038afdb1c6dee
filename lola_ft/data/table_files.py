"""Rows of .csv and .tsv files, as spreadsheets, pandas and databases write them. The first line names the columns."""

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lola_ft.data.rows import BadRow, Findings, Row, Rows, Source
from lola_ft.data.text_lines import decode, lines_of
from lola_ft.errors import DataError
from lola_ft.row_formats import kind_of_file

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Characters that may divide cells, and their names in messages."""

_SAMPLE = 100
"""Number of lines that are read to find the delimiter."""
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""A first line of Excel that names the delimiter."""


def table_rows(path: Path, source: Source, findings: Findings) -> Rows:
    """Read a table. All cells are text.

    A broken row on one line gives a BadRow. A broken row that may have swallowed other rows raises DataError.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell of 128 kB
    undecoded = dict[int, str]()
    lines, layout = _layout(_decoded(path, undecoded), path, source, findings)
    table, reader = _Table(layout), layout.reader(lines)
    try:
        while True:
            first = reader.line_num + layout.skipped + 1
            where, problem = f"{path}:{first}", ""
            try:
                if (cells := next(reader, None)) is None:
                    return
            except csv.Error as error:
                cells, problem = [], f"{where}: broken table: {str(error).rstrip('?.')}.{layout.hint}"
            last = reader.line_num + layout.skipped
            problem = next((undecoded[line] for line in range(first, last + 1) if line in undecoded), problem)
            if problem and (not table.columns or (not cells and last > first)):
                raise DataError(problem)
            if problem:
                yield BadRow(problem)
            elif cells and not table.columns:
                table.read_header(cells, where)
            elif any(cells):  # spreadsheets write empty rows too
                yield table.row(cells, where, first, last)
    finally:
        for note in table.notes(path):
            findings.note(note)


@dataclass(frozen=True)
class _Layout:
    """The form of a table file.

    Attributes:
        skipped: Number of lines before the header.
    """

    delimiter: str
    quoting: bool
    skipped: int
    advice: str

    def reader(self, lines: Iterable[str], strict: bool = True) -> Any:
        """Return a `csv.reader`."""
        quoting: Any = csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=self.delimiter, strict=strict, quoting=quoting)

    @property
    def hint(self) -> str:
        """The advice for a row that does not fit the header."""
        if self.quoting:
            return (
                ' Put cells that hold the separator, quotes or line breaks in "quotes", and write inner quotes twice; '
                f"if quotation marks are ordinary characters, set {self.advice}."
            )
        name = NAMES.get(self.delimiter, self.delimiter)
        return f" All {name} divide cells; if cells are quoted, set {self.advice}."


def _layout(lines: Iterator[str], path: Path, source: Source, findings: Findings) -> tuple[Iterator[str], _Layout]:
    """Find a table's form; returns its lines from the header on, and the form."""
    own = "\t" if kind_of_file(str(path)) == ".tsv" else ","
    quoting = own == "," if source.quoting is None else source.quoting
    advice = source.setting("quoting", "false" if quoting else "true")
    if source.by_options:
        advice = "`--no-quoting`" if quoting else "`--quoting`"
    sample = list(islice(lines, _SAMPLE))
    named = _SEP_LINE.fullmatch(sample[0]) if sample else None
    sample, skipped = (sample[1:], 1) if named else (sample, 0)
    delimiter = source.delimiter or (named[1] if named else None)
    if delimiter is None:
        delimiter = _found_delimiter(sample, own, quoting, path, source)
        if delimiter != own:
            findings.note(f"{path}: read with {NAMES[delimiter]} between cells.")
    return chain(sample, lines), _Layout(delimiter, quoting, skipped, advice)


def _found_delimiter(sample: list[str], own: str, quoting: bool, path: Path, source: Source) -> str:
    """Return the delimiter that fits the header and the most rows of a sample; in doubt the file kind's own.

    Raises:
        DataError: Two delimiters fit equally well.
    """
    fits: dict[str, float] = {}
    for delimiter in NAMES:
        widths = _widths(_Layout(delimiter, quoting, 0, "").reader(sample, strict=False), len(sample) == _SAMPLE)
        if widths and widths[0] > 1:
            fits[delimiter] = sum(width == widths[0] for width in widths[1:]) / max(len(widths) - 1, 1)
    if fits.get(own) == 1 or not fits:
        return own
    best = max(fits.values())
    candidates = [delimiter for delimiter, share in fits.items() if share == best]
    if own in candidates or (best < 0.5 and own not in fits and len(sample) > 1):
        return own
    if len(candidates) > 1:
        names = " or ".join(NAMES[delimiter] for delimiter in candidates)
        choice = source.setting("delimiter", f'"{candidates[0]}"')
        raise DataError(f"{path}: its cells may be divided by {names}. Set which, such as {choice}.")
    return candidates[0]


def _widths(reader: Iterable[list[str]], cut: bool) -> list[int]:
    """Count the cells per row, without empty cells at the end; the last row of a cut sample is ignored."""
    widths = list[int]()
    try:
        for cells in reader:
            width = max((place for place, cell in enumerate(cells, start=1) if cell.strip()), default=0)
            widths += [max(width, widths[0] if widths and len(cells) >= widths[0] else 0)] if cells else []
    except csv.Error:
        return widths
    return widths[:-1] if cut else widths


@dataclass
class _Table:
    """The columns of a table, and suspicious cells.

    Attributes:
        columns: Names; a column without a name is named by its number, such as `column 1`.
        unnamed: The given names of columns that had none.
        seen: Kinds of cells that may be unintended, with the first line and the number of rows.
    """

    layout: _Layout
    columns: list[str] = field(default_factory=list)
    unnamed: set[str] = field(default_factory=set)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read_header(self, cells: list[str], where: str) -> None:
        """Set the columns' names; raises DataError if two are equal, or all are empty."""
        names = [cell.strip() for cell in cells]
        if not self.layout.quoting and all(len(name) > 1 and name[0] == name[-1] == '"' for name in names):
            raise DataError(f"{where}: the columns' names are in quotation marks. Set {self.layout.advice}.")
        if not any(names):
            raise DataError(f"{where}: no column has a name. The first line must name the columns.")
        for index, name in enumerate(names):
            if name and name in names[:index]:
                raise DataError(f"{where}: two columns are named '{name}'. Rename one of them.")
        self.columns = [name or f"column {index + 1}" for index, name in enumerate(names)]
        self.unnamed = {self.columns[index] for index, name in enumerate(names) if not name}

    def row(self, cells: list[str], where: str, first: int, last: int) -> Row | BadRow:
        """Make a row of cells, which are on the lines `first` to `last` of the file."""
        count = len(self.columns)
        while len(cells) > count and not cells[-1].strip():  # empty columns of a spreadsheet
            cells.pop()
        least = max(place for place, name in enumerate(self.columns, start=1) if name not in self.unnamed)
        if not least <= len(cells) <= count:
            between = NAMES.get(self.layout.delimiter, repr(self.layout.delimiter))
            what = f"{len(cells)} cell{'' if len(cells) == 1 else 's'} between {between}; the header has {count}"
            only = f" ({self.columns[0][:60]})" if count == 1 else ""
            return BadRow(f"{where}: {what}{only}.{self.layout.hint}")
        self._look(cells, first, last)
        found = zip(self.columns, cells, strict=False)
        return Row({name: cell for name, cell in found if cell.strip() or name not in self.unnamed}, where)

    def _look(self, cells: list[str], first: int, last: int) -> None:
        if not self.layout.quoting:
            if any(cell.startswith('"') for cell in cells):
                self._see("opened", first)
        elif last > first:
            self._see("swallowed" if self._swallows(cells) else "over lines", first)
        elif self.layout.delimiter == "\t" and any("\t" in cell for cell in cells):
            self._see("separated", first)

    def _swallows(self, cells: list[str]) -> bool:
        """Tell whether the lines inside a cell could be rows by themselves."""
        between = len(self.columns) - 1
        for place, cell in enumerate(cells):
            start, *others = [line.count(self.layout.delimiter) for line in cell.split("\n")]
            if between and others and (start == between - place > 0 or between in others[:-1]):
                return True
        return False

    def _see(self, what: str, line: int) -> None:
        first, count = self.seen.get(what, (line, 0))
        self.seen[what] = first, count + 1

    def notes(self, path: Path) -> Iterator[str]:
        """Yield notes on cells that a user should check."""
        for what, (line, count) in self.seen.items():
            rows = "this row has" if count == 1 else f"this row and {count - 1:,} more have"
            yield f"{path}:{line}: {rows} {_SEEN[what].format(advice=self.layout.advice)}."


_SEEN = {
    "opened": "a cell that begins with a quotation mark, which stays in the text. If cells are quoted, set {advice}",
    "over lines": "a cell that spans several lines",
    "separated": "a cell with a tab inside",
    "swallowed": "a cell that looks like several rows: an opening quotation mark may have swallowed lines. If it is an "
    "ordinary character, set {advice}",
}


def _decoded(path: Path, undecoded: dict[int, str]) -> Iterator[str]:
    """Yield the lines as text. For a line that is not UTF-8, the message is put into `undecoded`."""
    for number, line in enumerate(lines_of(path), start=1):
        try:
            yield decode(line, f"{path}:{number}")
        except DataError as error:
            undecoded[number] = str(error)
            yield line.decode("utf-8", errors="surrogateescape")
