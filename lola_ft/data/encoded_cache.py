"""The cache of encoded rows on disk.

An entry is a folder named by a hash of everything that decides the rows. It holds `train.arrow`, `validation.arrow` if
there are validation rows, and `facts.json` with their checksums, their counts and other facts. A new entry is written
under a temporary name and then renamed, so that two processes may write the same entry at once. Only the entries used
last are kept.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lola_ft.data.encoding import Encoded, encoded_of
from lola_ft.data.encoding_report import Counts, EncodingReport
from lola_ft.data.table_store import map_table
from lola_ft.errors import UserError
from lola_ft.files import cache_root, sha256_of

VERSION = 4
"""Version of the encoding; changing it discards every entry."""
KEPT = 8
_FACTS = "facts.json"
_PARTIAL = ".partial-"
_DAY = 24 * 3600  # a folder that is unfinished for this long belongs to a killed process


@dataclass(frozen=True)
class StoredRows:
    """The contents of one cache entry.

    Attributes:
        facts: Plain values about the rows, as given to `keep`.
    """

    train: Encoded
    validation: Encoded | None
    facts: dict[str, Any]


class Damaged(Exception):  # noqa: N818 - not an error for users: the entry is written again
    """An entry whose files differ from what was written."""


def key_of(parts: dict[str, Any]) -> str:
    """Return the name of an entry: a hash of everything that decides the rows, given as plain values."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def table_file(folder: Path, side: str) -> Path:
    """Return the file that holds the rows of `train` or `validation`."""
    return folder / f"{side}.arrow"


def find_entry(key: str) -> StoredRows | None:
    """Map an entry's rows into memory; None if there is no entry. Removes a damaged entry and raises Damaged."""
    import pyarrow

    folder = _root() / key
    if not folder.is_dir():
        return None
    try:
        stored = _read(folder)
        os.utime(folder)  # marks it as used: the least recently used entry is removed first
        return stored
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Damaged(f"{folder.name}: {error}") from error


@contextlib.contextmanager
def new_folder() -> Iterator[tuple[Path, bool]]:
    """Make a folder to fill, and tell whether it can be kept: it is in the cache, or temporary if that is read-only.

    The folder is removed at the end unless `keep` moved it away. Tables mapped from it stay readable.

    Raises:
        UserError: The disk is full.
    """
    try:
        _root().mkdir(parents=True, exist_ok=True)
        folder, keepable = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=_root())), True
    except OSError:
        folder, keepable = Path(tempfile.mkdtemp(prefix="lola_ft-rows-")), False
    try:
        yield folder, keepable
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder.parent}: no room for the encoded rows. Make room, or set LOLA_FT_CACHE to a larger disk."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, key: str, rows: StoredRows) -> None:
    """Turn a filled folder into an entry, and remove the least recently used entries."""
    sides = {"train": rows.train, **({"validation": rows.validation} if rows.validation else {})}
    content = {
        "rows": rows.facts,
        "reports": {
            side: {code: asdict(counts) for code, counts in one.report.languages.items()} for side, one in sides.items()
        },
        "sha256": {side: sha256_of(table_file(folder, side)) for side in sides},
    }
    (folder / _FACTS).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with contextlib.suppress(OSError):  # another process made the same entry, which is equal
        folder.rename(_root() / key)
    folders = [path for path in _root().iterdir() if path.is_dir()]
    entries = sorted((path for path in folders if not path.name.startswith(_PARTIAL)), key=_used, reverse=True)
    left_behind = [path for path in folders if path.name.startswith(_PARTIAL) and _used(path) < time.time() - _DAY]
    for old in [*entries[KEPT:], *left_behind]:
        shutil.rmtree(old, ignore_errors=True)


def _root() -> Path:
    return cache_root() / "rows"


def _read(folder: Path) -> StoredRows:
    content = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    sides: dict[str, Encoded] = {}
    for side, digest in content["sha256"].items():
        file = table_file(folder, side)
        if sha256_of(file) != digest:
            raise ValueError(f"{file.name} has changed since it was written")
        report = EncodingReport({code: Counts(**counts) for code, counts in content["reports"][side].items()})
        sides[side] = encoded_of(map_table(file), report)
    return StoredRows(sides["train"], sides.get("validation"), content["rows"])


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0
