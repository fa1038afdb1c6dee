"""Rows of .jsonl, .ndjson and .json files.

One object a line is the common form. A file whose first line does not end what it begins is read as a whole: objects
that go over several lines, one list of objects, or one object that holds such a list (`{"data": […]}`).
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
        DataError: A file that is broken as a whole, or one whose rows cannot be told from the rest.
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
    """Return the next line that is not blank, with its number, in a list; none at the end."""
    return next(([(number, line)] for number, line in lines if line.strip()), [])


def _is_one_value(beginning: list[tuple[int, bytes]], path: Path) -> bool:
    """Tell from a file's first line whether rows go over several lines, or all lie in one list or object."""
    text = beginning[0][1].decode("utf-8", errors="replace").strip()
    if len(beginning) == 1:
        return text.startswith("[") or kind_of_file(str(path)) == ".json"
    return text.startswith(("{", "[")) and text.endswith(("{", "[", ",", ":"))


def object_lines(name: str, lines: Lines) -> Rows:
    """Read one object a line; a broken line spoils no other."""
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
    """Read all values of a file: many objects one after another, or one that holds the rows."""
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
            raise DataError(f"{path}: objects with commas between them. Put them in [ and ] to make it one list.")
        yield _row(parser, value, where)
        start = end


def _with_gaps(lines: Lines) -> Lines:
    """Put an empty line in place of each blank one that was passed over, so that numbers stay right."""
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
    """Rows of a file that is one value: a list, an object that holds the list, or an object that is the only row."""
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
            findings.note(f"{path}: the rows are those of the list under '{key}'.")
        value, place = under, f"{path}:{key}"
    if not isinstance(value, list):
        raise DataError(f"{path}: expected objects or a list of objects; found {in_words(value)}.")
    for index, row in enumerate(value):
        yield _row(parser, row, f"{place}[{index}]" if place != str(path) else f"{path}:[{index}]")


def _wrapping_key(value: dict[str, Any], path: Path, source: Source) -> str | None:
    """Return the key, or keys with dots, under which an object has the list of rows; None if it is a row itself.

    Raises:
        DataError: Several lists of rows, or a table in columns.
    """
    wanted = wanted_fields(source)
    if wanted & value.keys():
        if len(value) > 1 and all(_is_column(column) for column in value.values()):
            raise DataError(f"{path}: one object of columns, as pandas' to_json writes a table. {_RECORDS}")
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


_RECORDS = "Write one object a row; in pandas: df.to_json(path, orient='records', lines=True, force_ascii=False)."


def _under(value: dict[str, Any], key: str) -> Any:
    """Return what lies under a key, or under keys with dots between them; None if nothing does."""
    if key in value:
        return value[key]
    first, _, rest = key.partition(".")
    inner = value.get(first)
    return _under(inner, rest) if rest and isinstance(inner, dict) else None


def _is_column(value: Any) -> bool:
    """Tell whether a value can be a column of a table: its cells in a list, or under their numbers."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdigit() for key in value)
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _is_list_of_rows(value: Any) -> bool:
    """Tell whether a value can be a list of rows: objects, and not the turns of a conversation."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return not any({role, content} <= value[0].keys() for role, content in (("role", "content"), ("from", "value")))


class _Parser:
    """Parses texts, and remembers the last one's objects in which a key comes again: JSON leaves open what it means."""

    def __init__(self) -> None:
        repeats: dict[int, tuple[dict[str, Any], str]] = {}

        def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(pairs)
            if len(made) < len(pairs):
                keys = Counter(key for key, _ in pairs)
                repeats[id(made)] = made, max(keys, key=keys.__getitem__)  # it is kept, so its id stays its own
            return made

        self._repeats = repeats
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=make)

    def parse(self, text: str, where: str) -> Any:
        """Parse a line; raises DataError if it is no JSON."""
        value, end = self.parse_at(text, 0, where)
        if (end := _skip_blanks(text, end)) < len(text):
            hint = " Give each object a line of its own." if text[end] == "{" else ""
            raise DataError(f"{where}: broken JSON at column {end + 1}: extra data.{hint}")
        return value

    def parse_at(self, text: str, start: int, where: str, file: Path | None = None) -> tuple[Any, int]:
        """Parse the value that begins at a place; returns it and the place behind it.

        Args:
            file: Whose whole text it is: a mistake then gets its own line.
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
        """Return a value out of what was parsed last as a row: an object in which no key comes twice, at any depth."""
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
        return f"{where}: begins with a byte order mark, which only the beginning of a file may have. Remove it."
    what = f"{error.msg[:1].lower()}{error.msg[1:]}"
    hint = " It looks like Python's own notation: write rows with json.dumps." if text[error.pos :][:1] == "'" else ""
    return f"{where}: broken JSON at column {error.colno}: {what}.{hint}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null, or leave the field out")
