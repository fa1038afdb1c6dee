"""The rows of a source: local files, folders and globs, or a dataset on the Hub. Every row has its place."""

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from lola_ft.data.arrow_files import arrow_rows, parquet_rows, saved_files
from lola_ft.data.hub_rows import hub_rows
from lola_ft.data.json_files import json_rows
from lola_ft.data.rows import BadRow, Findings, Row, Rows, Source
from lola_ft.data.table_files import table_rows
from lola_ft.data.text_files import text_rows
from lola_ft.errors import DataError
from lola_ft.files import missing, similar_file
from lola_ft.repo_id import is_repo_id
from lola_ft.row_formats import JSON_FILES, TEXT_TABLES, kind_of_file

_READERS: dict[str, Callable[[Path, Source, Findings], Rows]] = {
    **dict.fromkeys(JSON_FILES, json_rows),
    **dict.fromkeys(TEXT_TABLES, table_rows),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".txt": text_rows,
}
KINDS = f"{', '.join(list(_READERS)[:-1])} and {list(_READERS)[-1]}"

_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|notice|changelog)(\.\w+)*|(dataset_infos?|dataset_dict|state)\.json", re.IGNORECASE
)
"""Names of files that describe a folder of data and hold no rows."""
_SAVE_AS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as .csv."),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), "Unpack it first."),
    **dict.fromkeys(
        (".md", ".text", ".log", ""), "If it is text, name it .txt; if it has one JSON object per line, name it .jsonl."
    ),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy"), "Save it as .parquet or .jsonl."),
}


def read_rows(source: Source) -> Iterator[Row]:
    """Return the rows of a source like `scan_rows`, but raise DataError at the first row that cannot be read."""
    return map(usable, scan_rows(source))


def scan_rows(source: Source, findings: Findings | None = None) -> Rows:
    """Return the rows of a source, good and bad. Missing files are found before the first row.

    Args:
        findings: Filled with the choices that readers make.

    Raises:
        DataError: A file is missing, of an unknown kind or broken as a whole, or there are no rows.
    """
    findings = findings or Findings()
    rows = hub_rows(source) if source.path is None else _rows_of(files_of(source.path, findings), source, findings)
    return islice(_at_least_one(rows, source.name), source.limit)


def files_of(path: str, findings: Findings | None = None) -> list[Path]:
    """Return the files that a path means, sorted by name; raises DataError if one is missing or of an unknown kind."""
    findings, place = findings or Findings(), Path(path)
    try:
        folder = place.is_dir()
        pattern = not folder and glob.has_magic(path) and not place.exists()
    except (OSError, ValueError):  # a name that is too long or has a zero byte: opening it reports that
        folder = pattern = False
    if folder:
        nothing = f"{path}: the folder holds no {KINDS.replace(' and ', ' or ')} file."
        return saved_files(place) or _matching(f"{glob.escape(path)}/**", nothing, findings)
    if pattern:
        return _matching(path, f"{path}: matches no file of a supported kind ({KINDS}).", findings)
    _check_opens(place, path)
    if kind_of_file(path) not in _READERS:
        advice = _SAVE_AS.get(place.suffix.lower(), "")
        raise DataError(f"{path}: unknown kind of file '{place.suffix}'. Supported are {KINDS}. {advice}".rstrip())
    return [place]


def _matching(pattern: str, nothing: str, findings: Findings) -> list[Path]:
    """Return the matching files of known kinds, sorted, except hidden files and files that only describe the data."""
    found = (Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob finds hidden ones
    known = [file for file in sorted(found) if kind_of_file(str(file)) in _READERS and file.is_file()]
    files = [file for file in known if not _ABOUT_DATA.fullmatch(file.name)]
    for file in sorted(set(known) - set(files)):
        findings.note(f"{file}: not read, because files of this name describe data and hold no rows.")
    if not files:
        raise DataError(nothing)
    for file in files:
        if any("\ud800" <= char <= "\udfff" for char in str(file)):  # Python's stand-in for a byte that is not text
            raise DataError(f"{file}: the name of the file or its folder is not UTF-8. Rename it.")
    return files


def _check_opens(path: Path, given: str) -> None:
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataError(_not_there(path, given)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


_DATASET_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/]+/[^/?#]+).*|hf://datasets/([^/]+/[^/@]+).*"
)


def _not_there(path: Path, given: str) -> str:
    """Return the message for a path that does not exist: what was probably meant, or where it was searched."""
    if page := _DATASET_PAGE.fullmatch(given):
        return f"{given}: is a dataset's address on the Hub. Write `hub: {page[1] or page[2]}` in place of `path`."
    if "://" in given:
        return f"{given}: is a web address, not a path. Download the file and give its path."
    if similar := similar_file(path):
        return f"{path}: no such file. Did you mean '{similar}'?"
    if is_repo_id(given) and not path.parent.is_dir() and kind_of_file(given) not in _READERS:
        return f"{missing(path)} If it is a dataset on the Hub, write `hub: {given}` in place of `path`."
    return missing(path)


def _rows_of(files: list[Path], source: Source, findings: Findings) -> Rows:
    for file in files:
        yield from _READERS[kind_of_file(str(file))](file, source, findings)


def _at_least_one(rows: Iterable[Row | BadRow], name: str) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no rows. Give a file with at least one row, or remove this source.")


def usable(row: Row | BadRow) -> Row:
    """Return a good row; raises DataError for a bad one."""
    if isinstance(row, BadRow):
        raise DataError(row.message)
    return row
