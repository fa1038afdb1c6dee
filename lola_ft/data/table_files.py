"""Rows of tables: .csv, .tsv and .parquet. The first line of a text table names its columns."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from lola_ft.data.rows import BOM, BadRow, Row, Rows, decode
from lola_ft.errors import DataError, first_line

_BATCH = 1000


def csv_rows(path: Path) -> Rows:
    """Cells between commas, quoted with `"` where they hold commas, quotes or line breaks; all cells are text."""
    return _cells(path, ",")


def tsv_rows(path: Path) -> Rows:
    """Read a file as `csv_rows` does, with tabs between the cells."""
    return _cells(path, "\t")


def _cells(path: Path, delimiter: str) -> Rows:
    """Rows of cells. A row that is broken on one line is bad; one that may have swallowed others ends the reading."""
    csv.field_size_limit(sys.maxsize)  # its default refuses a document of 128 kB
    undecoded = list[str]()
    with path.open("rb") as file:
        reader = csv.reader(_lines(file, path, undecoded), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            first = reader.line_num + 1
            where, problem = f"{path}:{first}", ""
            try:
                if (cells := next(reader, None)) is None:
                    return
            except csv.Error as error:
                cells, problem = [], f"{where}: broken table: {str(error).rstrip('?.')}.{_HINT}"
            problem = next(iter(undecoded), problem)
            undecoded.clear()
            if problem and (header is None or (not cells and reader.line_num > first)):
                raise DataError(problem)
            if problem:
                yield BadRow(problem)
            elif cells:
                if header is None:
                    header = _header(cells, where)
                else:
                    yield _row(header, cells, where)


def _row(header: list[str], cells: list[str], where: str) -> Row | BadRow:
    if len(cells) == len(header):
        return Row(dict(zip(header, cells, strict=True)), where)
    count = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
    return BadRow(f"{where}: {count}; the header has {len(header)}.{_HINT}")


_HINT = ' Put cells that hold the separator, quotes or line breaks in "quotes", and double quotes inside.'


def _lines(file: Iterator[bytes], path: Path, undecoded: list[str]) -> Iterator[str]:
    """The lines as text. Of one that is not UTF-8 the message goes into `undecoded`; it is given with its odd bytes."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(BOM) if number == 1 else line
        try:
            yield decode(text, f"{path}:{number}")
        except DataError as error:
            undecoded.append(str(error))
            yield text.decode("utf-8", errors="surrogateescape")


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for index, name in enumerate(names):
        if not name:
            raise DataError(f"{where}: column {index + 1} has no name. The first line names the columns.")
        if name in names[:index]:
            raise DataError(f"{where}: two columns are named '{name}'. Rename one of them.")
    return names


def parquet_rows(path: Path) -> Rows:
    """A Parquet file, read a thousand rows at a time."""
    import pyarrow
    from pyarrow import parquet

    if path.stat().st_size == 0:
        return
    try:
        with parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(_BATCH):
                for fields in batch.to_pylist():
                    yield Row(fields, f"{path}:[{index}]")
                    index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {first_line(error)}.") from None
