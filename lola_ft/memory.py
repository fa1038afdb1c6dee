"""Control of the freed memory that the process's allocator keeps."""

import ctypes
import sys
from collections.abc import Callable


def give_back_freed_memory() -> None:
    """Let the allocator return what was freed (glibc; elsewhere it does nothing).

    After many large buffers have come and gone, glibc keeps hundreds of megabytes in its arenas.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed for what comes next (glibc; elsewhere it does nothing).

    A training step on a CPU asks for the same large buffers again and again; by default glibc returns each to the
    system, which has to clear every page again: a tenth of a step and more.
    """
    if set_option := _of_glibc("mallopt"):
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
