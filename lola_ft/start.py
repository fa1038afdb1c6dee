"""The start of a command: output streams that accept any character, library settings, Ctrl-C, checked arguments."""

import io
import logging
import os
import platform
import re
import signal
import sys
import threading
from types import FrameType

from lola_ft.errors import UserError

_IMPORTING = "<frozen importlib._bootstrap>"
_TEXTS = ("--prompt", "--instruction")
"""Options whose value is text, in which `~` is not replaced."""
_OPTION = re.compile(r"(--[\w-]+=)(~.*)", re.DOTALL)


def prepare_process() -> None:
    """Make stdout and stderr replace characters that they cannot encode, and Ctrl-C end imports without a traceback.

    Also sets what torch's libraries read when they are loaded (`set_library_defaults`).
    """
    set_library_defaults()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # bitsandbytes (0.50) logs that a kernel is not installed which our 4-bit layers do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    first = threading.current_thread() is threading.main_thread()
    if first and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def set_library_defaults() -> None:
    """Set environment variables of torch's libraries, where the user has not; call it before torch is imported.

    - `OMP_WAIT_POLICY`: OpenMP's waiting threads sleep. Spinning ones slow a step tenfold on a machine that other
      programs use too; on an idle machine sleeping costs nothing.
    - `LRU_CACHE_CAPACITY`: torch keeps 64 kernels of oneDNN in place of 1,024, one per shape of a product, about half
      a megabyte large. oneDNN keeps 1,024 itself, so nothing is slower. Measured on x86, so set only there. Fewer in
      oneDNN's own cache did not help: what is thrown out leaves gaps.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
    """Handle Ctrl-C. During an import exit at once: libraries may turn a KeyboardInterrupt into another error."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            os.write(2, b"\nStopped.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def checked_arguments(arguments: list[str]) -> list[str]:
    """Return a command's arguments with the home folder in place of a `~` that the shell did not replace.

    Raises:
        UserError: An argument is not text.
    """
    checked, before = list[str](), ""
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):  # Python's stand-in for a byte that is not text
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            raise UserError(f"the argument '{shown}' is not text in UTF-8. Write it in UTF-8, or put it into a file.")
        option = _OPTION.fullmatch(argument)
        name = option[1].rstrip("=") if option else before
        if name not in _TEXTS:
            start, path = (option[1], option[2]) if option else ("", argument)
            argument = start + os.path.expanduser(path)  # noqa: PTH111 - what follows may be no path, and stays
        checked.append(argument)
        before = argument
    return checked
