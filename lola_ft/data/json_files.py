"""Rows of .jsonl, .ndjson and .json files.

The common form has one object per line. If the first line is not a complete object, the file is read as a whole: it may
have objects over several lines, one list of objects, or one object that holds such a list (`{"data": […]}`).
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from lola_ft.data.fields import wanted_fields
from lola_ft.data.rows import BadRow, Findings, Row, Rows, Source
from lola_ft.data.text_lines import decode, lines_of
from lola_ft.errors import DataError, in_words, printable
from lola_ft.row_formats import kind_of_file


def json_rows(path: Path, source: Source, findings: Findings) -> Rows:
    """Read a file's objects.

    Raises:
        DataError: The file is broken as a whole, or it is unclear which of its values are the rows.
    """
    lines = enumerate(lines_of(path), start=1)
    beginning = [*_next_full(lines), *_next_full(lines)]
    everything = chain(beginning, lines)
    if beginning and (source.rows_under or _is_one_value(beginning, path)):
        yield from _whole(path, everything, source, findings)
    else:
        yield from object_lines(str(path), everything)


Lines = Iterator[tuple[int, bytes]]


def _next_full(lines: Lines) -> list[tuple[int, bytes]]:
    """Return a list with the next line that is not blank and its number; an empty list at the end."""
    return next(([(number, line)] for number, line in lines if line.strip()), [])


def _is_one_value(beginning: list[tuple[int, bytes]], path: Path) -> bool:
    """Tell from a file's first line whether rows span several lines or are all inside one list or object."""
    text = beginning[0][1].decode("utf-8", errors="replace").strip()
    if len(beginning) == 1:
        return text.startswith("[") or kind_of_file(str(path)) == ".json"
    return text.startswith(("{", "[")) and text.endswith(("{", "[", ",", ":"))


def object_lines(name: str, lines: Lines) -> Rows:
    """Read one object per line; a broken line does not affect other lines."""
    parser = _Parser()
    for number, line in lines:
        where = f"{name}:{number}"
        try:
            text = decode(line, where).strip(" \t\r\n")
            if text:
                yield Row(parser.row(parser.parse(text, where), where), where)
        except DataError as error:
            yield BadRow(str(error))


def _whole(path: Path, lines: Lines, source: Source, findings: Findings) -> Rows:
    """Read all values of a file: objects one after another, or one value that holds all rows."""
    text = "".join(decode(line, f"{path}:{number}") for number, line in _with_gaps(lines))
    parser, start, counted, number = _Parser(), 0, 0, 1
    while (start := _skip_blanks(text, start)) < len(text):
        number += text.count("\n", counted, start)
        counted, where = start, f"{path}:{number}"
        value, end = parser.parse_at(text, start, where, path)
        rest = _skip_blanks(text, end)
        if start == _skip_blanks(text, 0) and rest == len(text):
            yield from _rows_of(value, path, source, findings, parser)
            return
        if text[rest : rest + 1] == ",":
            raise DataError(f"{path}: objects with commas between them. Put them all in [ and ] to make one list.")
        yield _row(parser, value, where)
        start = end


def _with_gaps(lines: Lines) -> Lines:
    """Yield an empty line for each blank line that was skipped, so that line numbers stay right."""
    last = 0
    for number, line in lines:
        yield from ((gap, b"\n") for gap in range(last + 1, number))
        yield number, line
        last = number


def _skip_blanks(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def _row(parser: "_Parser", value: Any, where: str) -> Row | BadRow:
    try:
        return Row(parser.row(value, where), where)
    except DataError as error:
        return BadRow(str(error))


def _rows_of(value: Any, path: Path, source: Source, findings: Findings, parser: "_Parser") -> Rows:
    """Yield the rows of a file with one value: a list, an object that holds the list, or a single row."""
    place = str(path)
    if isinstance(value, dict):
        key = source.rows_under or _wrapping_key(value, path, source)
        if key is None:
            yield _row(parser, value, f"{path}:1")
            return
        under = _under(value, key)
        if not isinstance(under, list):
            raise DataError(f"{path}: has no list under '{key}' (found: {', '.join(value)}).")
        if source.rows_under is None:
            findings.note(f"{path}: the rows are in the list under '{key}'.")
        value, place = under, f"{path}:{key}"
    if not isinstance(value, list):
        raise DataError(f"{path}: expected objects or a list of objects; found {in_words(value)}.")
    for index, row in enumerate(value):
        yield _row(parser, row, f"{place}[{index}]" if place != str(path) else f"{path}:[{index}]")


def _wrapping_key(value: dict[str, Any], path: Path, source: Source) -> str | None:
    """Return the key (or keys joined by dots) of an object's list of rows; None if the object is itself a row.

    Raises:
        DataError: The object has several lists of rows, or is a table in columns.
    """
    wanted = wanted_fields(source)
    if wanted & value.keys():
        if len(value) > 1 and all(_is_column(column) for column in value.values()):
            raise DataError(f"{path}: one object with the columns of a table, as pandas' to_json writes. {_RECORDS}")
        return None
    if len(value) > 1 and all(isinstance(row, dict) and wanted & row.keys() for row in value.values()):
        raise DataError(f"{path}: one object with a row under each key. {_RECORDS}")
    lists = {key: rows for key, rows in value.items() if _is_list_of_rows(rows)} or {
        f"{key}.{inner}": rows
        for key, part in value.items()
        if isinstance(part, dict)
        for inner, rows in part.items()
        if _is_list_of_rows(rows)
    }
    fitting = [key for key, rows in lists.items() if wanted & rows[0].keys()] or list(lists)
    if len(fitting) > 1:
        choice = source.setting("rows_under", fitting[0])
        raise DataError(f"{path}: one object with several lists of rows ({', '.join(fitting)}). Choose one: {choice}.")
    return fitting[0] if fitting else None


_RECORDS = "Write one object per row; in pandas: df.to_json(path, orient='records', lines=True, force_ascii=False)."


def _under(value: dict[str, Any], key: str) -> Any:
    """Return the value at a key, or at keys joined by dots; None if there is none."""
    if key in value:
        return value[key]
    first, _, rest = key.partition(".")
    inner = value.get(first)
    return _under(inner, rest) if rest and isinstance(inner, dict) else None


def _is_column(value: Any) -> bool:
    """Tell whether a value can be a column of a table: a list of cells, or an object from row number to cell."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdigit() for key in value)
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _is_list_of_rows(value: Any) -> bool:
    """Tell whether a value can be a list of rows: objects that are not the turns of a conversation."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return not any({role, content} <= value[0].keys() for role, content in (("role", "content"), ("from", "value")))


class _Parser:
    """Parses JSON, and remembers objects of the last text with a repeated key, which JSON leaves undefined."""

    def __init__(self) -> None:
        repeats: dict[int, tuple[dict[str, Any], str]] = {}

        def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(pairs)
            if len(made) < len(pairs):
                keys = Counter(key for key, _ in pairs)
                repeats[id(made)] = made, max(keys, key=keys.__getitem__)  # keeping the object keeps its id unique
            return made

        self._repeats = repeats
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=make)

    def parse(self, text: str, where: str) -> Any:
        """Parse a line; raises DataError if it is not JSON."""
        value, end = self.parse_at(text, 0, where)
        if (end := _skip_blanks(text, end)) < len(text):
            hint = " Give each object a line of its own." if text[end] == "{" else ""
            raise DataError(f"{where}: broken JSON at column {end + 1}: extra data.{hint}")
        return value

    def parse_at(self, text: str, start: int, where: str, file: Path | None = None) -> tuple[Any, int]:
        """Parse the value that begins at `start`; returns the value and the position after it.

        Args:
            file: The file, if `text` is its whole content; mistakes are then reported with their own line.
        """
        self._repeats.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError(_broken(error, text, f"{file}:{error.lineno}" if file else where)) from None
        except RecursionError:
            raise DataError(f"{where}: nested too deeply.") from None
        except ValueError as error:
            raise DataError(f"{where}: broken JSON: {error}.") from None

    def row(self, value: Any, where: str) -> dict[str, Any]:
        """Return a value parsed last as a row; raises DataError unless it is an object without repeated keys."""
        if not isinstance(value, dict):
            raise DataError(f'{where}: expected an object such as {{"instruction": …}}; found {in_words(value)}.')
        inside: list[Any] = [value] if self._repeats else []
        while inside:
            part = inside.pop()
            if id(part) in self._repeats:
                key = printable(self._repeats[id(part)][1])
                raise DataError(f"{where}: key '{key}' comes more than once in an object. Keep one of them.")
            inside += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return value


def _broken(error: json.JSONDecodeError, text: str, where: str) -> str:
    if text.startswith("\ufeff"):
        return f"{where}: begins with a byte order mark, which is allowed only at the beginning of a file. Remove it."
    what = f"{error.msg[:1].lower()}{error.msg[1:]}"
    hint = " It looks like Python's notation: write rows with json.dumps." if text[error.pos :][:1] == "'" else ""
    return f"{where}: broken JSON at column {error.colno}: {what}.{hint}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null, or leave the field out")
