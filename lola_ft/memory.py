"""Control over freed memory that the process's allocator keeps."""

import ctypes
import sys
from collections.abc import Callable


def give_back_freed_memory() -> None:
    """Make the allocator return freed memory to the system (only with glibc).

    After many large buffers were used and freed, glibc keeps hundreds of megabytes in its arenas.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def keep_freed_memory() -> None:
    """Make the allocator keep freed memory for later use (only with glibc).

    A training step on a CPU uses the same large buffers again and again. By default glibc returns each buffer to the
    system, which then has to clear every page again. This costs a tenth of a step or more.
    """
    if set_option := _of_glibc("mallopt"):
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
