"""The run folder: its files' names, and who may write there. A file lock keeps one folder to one run.

The system releases the lock with the process that holds it, however that ends.
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
"""The files of a run that was killed before its recipe was there."""


def refuse_unwritable(output: Path) -> None:
    """Refuse an output folder in which nothing can be written, before any work is done; nothing is left behind."""
    place = output.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error


def refuse_bad_output(output: Path) -> None:
    """Refuse an output folder that is taken or cannot be written to. Nothing heavy is needed to find out."""
    refuse_taken(output)
    refuse_unwritable(output)


def refuse_taken(output: Path) -> None:
    """Refuse an output folder that holds anything, before any work is done, and say how to go on."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: output is a file; name a folder.")
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
    """Lock the folder of a new run until `held` is closed; a folder that holds anything is refused."""
    held.enter_context(lock_folder(output))
    refuse_taken(output)


def is_finished(output: Path) -> bool:
    """Say whether a run has written everything that it writes; the card is the last."""
    return (output / MANIFEST_FILE).exists() and (output / CARD_FILE).exists()


@contextlib.contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Hold the folder for this process, and make it if it does not exist; refuse one that another process holds."""
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
            path.unlink()  # while it is held: a process that waits for this file finds out that it is gone
        os.close(descriptor)


def is_locked(output: Path) -> bool:
    """Say whether a run is going on in a folder; nothing is written to find out."""
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
    """Open and lock the file; again, if another process removed it between opening and locking."""
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
