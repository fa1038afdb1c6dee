"""Writing files and folders completely or not at all (under a temporary name, then renamed), copying and hashing."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from lola_ft.errors import UserError, WriteError

_DISK = (
    *(errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    errno.ENOTDIR,  # a part of the path is a file
)


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Give a new folder to fill. It replaces `path` if the block succeeds, and is removed if the block fails.

    Raises:
        WriteError: It could not be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _named(target, partial):
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def check_file_target(path: str | Path) -> None:
    """Raise UserError, before any work is done, if a file cannot be written to a path.

    Raises:
        UserError: The path is a folder, or its parent is not a writable folder.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder. Name a file to write.")
    check_folder_target(Path(path).parent)


def check_folder_target(path: str | Path) -> None:
    """Raise UserError, before any work is done, if a folder cannot be written to.

    Raises:
        UserError: The path, or its nearest existing parent, is not a folder or may not be written to.
    """
    place = Path(path).absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path}: cannot be written, because {place} is not a folder. Choose another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, because you may not write to {place}. Choose another place.")


def check_new_folder(path: str | Path) -> None:
    """Raise UserError, before any work is done, unless a path can become a new folder.

    Raises:
        UserError: The path is a file or a folder that is not empty, or its parent is not writable.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path}: exists and is not empty. Choose another --out, or remove it first.")
    check_folder_target(path)


def cache_root() -> Path:
    """Return the cache folder: `$LOLA_FT_CACHE`, or `lola_ft` in the user's cache folder."""
    own = os.environ.get("LOLA_FT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lola_ft"


def write_text(path: str | Path, text: str) -> None:
    """Write a file completely or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        WriteError: It could not be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    with _named(target, partial):
        try:
            with partial.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _named(target: Path, partial: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk during the block into a WriteError that names the target."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and partial.name not in Path(os.fsdecode(error.filename)).parts
        if elsewhere or error.errno not in _DISK:
            raise
        raise WriteError(target, error.strerror or str(error)) from error
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise WriteError(target, str(error)) from error


def missing(name: str | Path, kind: str = "file") -> str:
    """Return the message for a path that does not exist, with the folders searched and where it does exist."""
    path = Path(name)
    if path.is_absolute():
        at_all = "" if path.parent.is_dir() else f" The folder '{path.parent}' does not exist either."
        return f"{name}: no such {kind}.{at_all}"
    here = Path.cwd()
    above = next((folder for folder in here.parents if (folder / path).exists()), None)
    found = f" It exists relative to {above}." if above else ""
    return f"{name}: no such {kind} in {here}, the folder that relative paths start from.{found}"


def similar_file(path: Path) -> Path | None:
    """Return a file of the same folder with a similar name, or with the same name and an ending; None if none."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return None
    close = get_close_matches(path.name, names, n=1) or [name for name in names if Path(name).stem == path.name]
    return path.with_name(close[0]) if close else None


def sha256_of(*files: Path) -> str:
    """Return the SHA-256 of the joined contents of files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a folder whose names match a pattern: only their content, not their permissions."""
    for file in sorted(file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
        shutil.copyfile(file, target / file.name)
