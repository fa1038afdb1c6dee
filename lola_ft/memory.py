"""What the process holds of the machine's memory."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Let the allocator return what was freed (glibc; elsewhere it does nothing).

    After many large buffers have come and gone, glibc keeps hundreds of megabytes in its arenas.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
