"""The run folder and its lock. A file lock lets only one process at a time write to a run folder.

The operating system releases the lock when the process ends, also after a crash.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lola_ft.errors import UserError
from lola_ft.file_names import CARD_FILE, MANIFEST_FILE, RECIPE_FILE, START_FOLDER

LOCK_FILE = ".lock"

_NOTHING_YET = (LOCK_FILE, f".{RECIPE_FILE}.partial", START_FOLDER, f".{START_FOLDER}.partial")
"""Files of a run that was killed before its recipe was written. A folder with only these counts as empty."""


def refuse_unwritable(output: Path) -> None:
    """Raise UserError if the output folder is not writable. Leaves no file behind."""
    place = output.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error


def refuse_bad_output(output: Path) -> None:
    """Raise UserError if the output folder is in use or not writable. Imports nothing heavy."""
    refuse_taken(output)
    refuse_unwritable(output)


def refuse_taken(output: Path) -> None:
    """Raise UserError if the output folder is not empty, with advice on how to continue."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: output is a file. Name a folder.")
    if not output.is_dir() or all(path.name in _NOTHING_YET for path in output.iterdir()):
        return
    if not (output / RECIPE_FILE).exists():
        raise UserError(f"{output}: is not empty. Choose another `output`, or remove that folder first.")
    if is_locked(output):
        raise UserError(f"{output}: already holds a run, which is going on. Choose another `output`.")
    go_on = "" if is_finished(output) else "Go on with it with --resume, "
    choose = "choose" if go_on else "Choose"
    raise UserError(f"{output}: already holds a run. {go_on}{choose} another `output`, or remove that folder first.")


def take_folder(output: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder of a new run until `held` is closed; raises UserError if the folder is not empty."""
    held.enter_context(lock_folder(output))
    refuse_taken(output)


def is_finished(output: Path) -> bool:
    """Tell whether a run has written all its files; the card is the last one."""
    return (output / MANIFEST_FILE).exists() and (output / CARD_FILE).exists()


@contextlib.contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Lock a folder for this process, making it if needed; raises UserError if another process has the lock."""
    path = output / LOCK_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except BlockingIOError:
        raise UserError(
            f"{output}: {_holder(path)} is training here. Wait for it, or choose another `output`."
        ) from None
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # removed before the lock is released: a process that opened the file sees that it is gone
        os.close(descriptor)


def is_locked(output: Path) -> bool:
    """Tell whether a process is training in a folder. Writes nothing."""
    try:
        descriptor = os.open(output / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _open_locked(path: Path) -> int:
    """Open and lock the file; try again if another process removed the file between opening and locking."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(path.read_text(encoding='ascii'))}"
    return "another process"


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot be written to ({error.strerror}). Choose another `output`.")
