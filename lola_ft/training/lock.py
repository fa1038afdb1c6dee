"""One run folder, one run: a file lock that the system releases with the process that holds it, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lola_ft.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Hold the folder for this process; it is made if need be.

    Raises:
        UserError: Another process trains there, or nothing can be written there.
    """
    path = output / LOCK_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except BlockingIOError:
        raise UserError(
            f"{output}: {_holder(path)} is training here. Wait for it, or choose another `output`."
        ) from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror}). Choose another `output`.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for this file finds out that it is gone
        os.close(descriptor)


def is_locked(output: Path) -> bool:
    """Whether a run is going on in a folder; nothing is written to find out."""
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
    """The lock file, locked; opened anew if the one before was removed between opening and locking."""
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
