"""Rows of .jsonl files, one object a line, and of .json files, one list of objects."""

import json
from pathlib import Path
from typing import Any, NoReturn

from lola_ft.data.rows import BOM, BadRow, Row, Rows, decode
from lola_ft.errors import DataError


def jsonl_rows(path: Path) -> Rows:
    """One object a line. Lines end with a newline byte only, so that U+2028 may stand in a text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = decode(line.removeprefix(BOM) if number == 1 else line, where).strip(" \t\r\n")
                if text:
                    yield Row(_object(_parse(text, where), where), where)
            except DataError as error:
                yield BadRow(str(error))


def json_rows(path: Path) -> Rows:
    """One list of objects; a file that is not such a list is refused as a whole."""
    text = decode(path.read_bytes().removeprefix(BOM), str(path))
    if not text.strip():
        return
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects; found {_kind(rows)}.")
    for index, row in enumerate(rows):
        where = f"{path}:[{index}]"
        try:
            yield Row(_object(row, where), where)
        except DataError as error:
            yield BadRow(str(error))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(_broken(error, text, where)) from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply.") from None
    except ValueError as error:
        raise DataError(f"{where}: broken JSON: {error}.") from None


def _broken(error: json.JSONDecodeError, text: str, where: str) -> str:
    if where.endswith(".json"):  # the whole file was read, so the line is the error's own
        where = f"{where}:{error.lineno}"
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return f"{where}: more than one object. A file with one object a line is named .jsonl."
    if text.strip() in ("[", "[{") and where.endswith(":1"):
        return f"{where}: a list that goes over several lines. A file that is one JSON list is named .json."
    return f"{where}: broken JSON at column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"instruction": …}}; found {_kind(value)}.')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
