"""The beginning of a command: streams that take any character, Ctrl-C while libraries load, arguments as meant."""

import io
import logging
import os
import re
import signal
import sys
import threading
from types import FrameType

from lola_ft.errors import UserError

_IMPORTING = "<frozen importlib._bootstrap>"
_TEXTS = ("--prompt", "--instruction")
"""Options whose value is text, in which a `~` is a `~`."""
_OPTION = re.compile(r"(--[\w-]+=)(~.*)", re.DOTALL)


def prepare_process() -> None:
    """Let stdout and stderr replace what their encoding does not have, and Ctrl-C end an import in silence."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # bitsandbytes (0.50) says of a kernel that our 4-bit layers do not use that it is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    first = threading.current_thread() is threading.main_thread()
    if first and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as the system calls it
    """Answer Ctrl-C: a library that is being imported may turn a KeyboardInterrupt into anything, so it gets none."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            os.write(2, b"\nStopped.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def checked_arguments(arguments: list[str]) -> list[str]:
    """Return a command's arguments with the home folder in place of a `~` that no shell replaced.

    Raises:
        UserError: An argument that is not text.
    """
    checked, before = list[str](), ""
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):  # how Python shows a byte that is no text
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
