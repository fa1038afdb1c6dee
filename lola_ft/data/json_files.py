"""Rows of .jsonl files, one object a line, and of .json files, one list of objects."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from lola_ft.data.rows import BOM, BadRow, Row, Rows, decode
from lola_ft.errors import DataError, printable


def jsonl_rows(path: Path) -> Rows:
    """One object a line. Lines end with a newline byte only, so that U+2028 may stand in a text."""
    parser = _Parser()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = decode(line.removeprefix(BOM) if number == 1 else line, where).strip(" \t\r\n")
                if text:
                    yield Row(parser.row(parser.parse(text, where), where), where)
            except DataError as error:
                yield BadRow(str(error))


def json_rows(path: Path) -> Rows:
    """One list of objects; a file that is not such a list is refused as a whole."""
    text = decode(path.read_bytes().removeprefix(BOM), str(path))
    if not text.strip():
        return
    parser = _Parser()
    rows = parser.parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects; found {_kind(rows)}.")
    for index, row in enumerate(rows):
        where = f"{path}:[{index}]"
        try:
            yield Row(parser.row(row, where), where)
        except DataError as error:
            yield BadRow(str(error))


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
        """Parse one text; raises DataError if it is no JSON."""
        self._repeats.clear()
        try:
            return self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise DataError(_broken(error, text, where)) from None
        except RecursionError:
            raise DataError(f"{where}: nested too deeply.") from None
        except ValueError as error:
            raise DataError(f"{where}: broken JSON: {error}.") from None

    def row(self, value: Any, where: str) -> dict[str, Any]:
        """Return a value out of what was parsed last as a row: an object in which no key comes twice, at any depth."""
        if not isinstance(value, dict):
            raise DataError(f'{where}: expected an object such as {{"instruction": …}}; found {_kind(value)}.')
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
    if where.endswith(".json"):  # the whole file was read, so the line is the error's own
        where = f"{where}:{error.lineno}"
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return f"{where}: more than one object. A file with one object a line is named .jsonl."
    if text.strip() in ("[", "[{") and where.endswith(":1"):
        return f"{where}: a list that goes over several lines. A file that is one JSON list is named .json."
    return f"{where}: broken JSON at column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
