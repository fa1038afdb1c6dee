"""Independent pieces of work side by side on a CPU, each on one thread.

For many small operations this is faster than running one after another on all threads. All threads wait for each other
at the end of each operation, and on a busy core this wait takes longer than the operation.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def side_by_side(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `work` for each item in any order, as many at a time as torch has threads, without autograd.

    Raises:
        Exception: The first one that `work` raised.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        with torch.no_grad():
            for item in items:
                work(item)
        return
    inference, left = torch.is_inference_mode_enabled(), iter(items)

    def work_off() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has its own state of both
            for item in left:
                work(item)

    pool = _pool(threads, os.getpid())  # after a fork the parent's threads do not exist
    torch.set_num_threads(1)  # MKL reads the number of the process, not of the thread
    try:
        for done in [pool.submit(work_off) for _ in range(threads)]:
            done.result()
    finally:
        torch.set_num_threads(threads)


def in_blocks(fill: Callable[[slice], None], rows: int, device: torch.device, block: int = 256) -> None:
    """Call `fill` for all rows; on a CPU for `block` rows at a time, so that its intermediates stay in the cache."""
    if device.type == "cpu":
        side_by_side(fill, [slice(first, min(first + block, rows)) for first in range(0, rows, block)])
    else:
        fill(slice(0, rows))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 (each process has its own)
    """Return the kept pool of threads. Operations on them use one thread each."""
    return ThreadPoolExecutor(threads, "lola-ft-experts", initializer=torch.set_num_threads, initargs=(1,))
