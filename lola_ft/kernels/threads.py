"""Independent pieces of work side by side on a CPU, each on one thread.

Many small operations are quicker so than one after another on all threads: at the end of each of these the threads
wait for one another, which takes longer than the operation where a core is busy with something else as well.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def side_by_side(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `work` for each item, in any order, as many at a time as torch has threads; without autograd.

    Raises:
        Exception: The first that `work` raised.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        with torch.no_grad():
            for item in items:
                work(item)
        return
    inference, left = torch.is_inference_mode_enabled(), iter(items)

    def work_off() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            for item in left:
                work(item)

    pool = _pool(threads, os.getpid())  # a forked process has no threads
    torch.set_num_threads(1)  # for MKL, which asks for the process's number
    try:
        for done in [pool.submit(work_off) for _ in range(threads)]:
            done.result()
    finally:
        torch.set_num_threads(threads)


def in_blocks(fill: Callable[[slice], None], rows: int, device: torch.device, block: int = 256) -> None:
    """Call `fill` for all rows: on a CPU for some at a time, so that what it makes on the way stays in the cache."""
    if device.type == "cpu":
        side_by_side(fill, [slice(first, min(first + block, rows)) for first in range(0, rows, block)])
    else:
        fill(slice(0, rows))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 (each process has its own)
    """Threads whose operations do not start further ones."""
    return ThreadPoolExecutor(threads, "lola-ft-experts", initializer=torch.set_num_threads, initargs=(1,))
