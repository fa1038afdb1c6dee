"""Encoded rows on disk, found again by everything that decides them.

An entry is a folder named by a hash of all that: `train.arrow`, perhaps `validation.arrow`, and `facts.json` with the
checksums of both, the counts, and what else is worth remembering of the rows. It is filled beside and renamed, so that
two processes may do the same at once; the newest few stay.
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
_DAY = 24 * 3600  # no process fills a folder for so long: the one that began it was killed


@dataclass(frozen=True)
class StoredRows:
    """Contents of one cache entry.

    Attributes:
        facts: Plain values about the rows, as they were given.
    """

    train: Encoded
    validation: Encoded | None
    facts: dict[str, Any]


class Damaged(Exception):  # noqa: N818 - the cache mends itself; nobody needs to do anything
    """An entry that is not what was written."""


def key_of(parts: dict[str, Any]) -> str:
    """The name of an entry: a hash of everything that decides the rows, in plain values."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def table_file(folder: Path, side: str) -> Path:
    """Return the file that holds the rows of `train` or `validation`."""
    return folder / f"{side}.arrow"


def find_entry(key: str) -> StoredRows | None:
    """Map the rows of an entry, None if there is none; raises Damaged, and removes it, if it is not as written."""
    import pyarrow

    folder = _root() / key
    if not folder.is_dir():
        return None
    try:
        stored = _read(folder)
        os.utime(folder)  # the oldest by use goes first
        return stored
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Damaged(f"{folder.name}: {error}") from error


@contextlib.contextmanager
def new_folder() -> Iterator[tuple[Path, bool]]:
    """A folder to fill, and whether it can be kept: in the cache, or where that cannot be written, a temporary one.

    It is removed at the end, if `keep` did not move it away; what is mapped from it stays readable.

    Raises:
        UserError: There is no room.
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
    """Make the entry of a filled folder, and remove entries that were not used for long."""
    sides = {"train": rows.train, **({"validation": rows.validation} if rows.validation else {})}
    content = {
        "rows": rows.facts,
        "reports": {
            side: {code: asdict(counts) for code, counts in one.report.languages.items()} for side, one in sides.items()
        },
        "sha256": {side: sha256_of(table_file(folder, side)) for side in sides},
    }
    (folder / _FACTS).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with contextlib.suppress(OSError):  # another process made the same entry; either will do
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
