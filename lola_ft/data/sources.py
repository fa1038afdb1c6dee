"""Where rows come from: a local .jsonl or .json file, or a dataset on the Hub. Every row knows its place."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lola_ft.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Source:
    """One set of rows; the keys are those of a recipe's `data.sources`."""

    format: str
    path: str | None = None
    hub: str | None = None
    split: str | None = None
    """Split of the Hub dataset; None is `train`."""
    revision: str | None = None
    language: str | None = None
    language_column: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name: the file's field name."""

    @property
    def name(self) -> str:
        """What messages call it: the path, or the Hub id with its split."""
        return self.path if self.path is not None else f"{self.hub}[{self.split or 'train'}]"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was found, and its place: `file:line`, `file:[index]` or `dataset[split]:[index]`."""

    fields: dict[str, Any]
    where: str


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, one after the other; what is missing altogether is found before the first one.

    Raises:
        DataError: No such file, an unknown kind of file, a broken line, text that is not UTF-8, or no rows at all.
    """
    rows = _file_rows(Path(source.path)) if source.path is not None else _hub_rows(source)
    return _at_least_one(rows, source.name)


def _at_least_one(rows: Iterable[Row], name: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no rows. Give a file with at least one, or remove this source.")


def _file_rows(path: Path) -> Iterator[Row]:
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.{_near(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder. Name a {' or '.join(_READERS)} file in it.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'. This version reads {' and '.join(_READERS)}.")
    return reader(path)


def _near(path: Path) -> str:
    """A hint at a file of the same folder with nearly the same name."""
    if not path.parent.is_dir():
        return f" There is no folder '{path.parent}' either."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{path.with_name(close[0])}'?" if close else ""


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """One object a line. Lines end with a newline byte only, so that U+2028 may stand in a text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(_BOM)
            text = _decode(line, where).strip(" \t\r\n")
            if text:
                yield Row(_object(_parse(text, where), where), where)


def _json_rows(path: Path) -> Iterator[Row]:
    """One list of objects."""
    text = _decode(path.read_bytes().removeprefix(_BOM), str(path))
    if not text.strip():
        return
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects; found {_kind(rows)}.")
    for index, row in enumerate(rows):
        where = f"{path}:[{index}]"
        yield Row(_object(row, where), where)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl_rows, ".json": _json_rows}


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            raise DataError(f"{where}: the file is UTF-16, not UTF-8. Save it as UTF-8.") from None
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


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


def _hub_rows(source: Source) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source.hub, split=source.split or "train", revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{source.name}: cannot be loaded from the Hub: {reason}") from None
    return (Row(dict(row), f"{source.name}:[{index}]") for index, row in enumerate(rows))
