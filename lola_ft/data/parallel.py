"""Work on batches in several threads, with the results, and the first mistake, in the order of the batches.

Threads, not processes: tokenising is done outside of Python's lock, on all cores; a second thread does Python's part of
the work meanwhile. Processes would each hold the libraries once more.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2
"""Batches of each thread that are on their way."""


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(work, items)` in `workers` threads.

    The first item is done before the threads start: a tokenizer's first call sets it up. An error raised while reading
    the items comes after the results of the items before it, as in `map`.
    """
    iterator = iter(items)
    for first in iterator:
        yield work(first)
        break
    if workers == 1:
        yield from map(work, iterator)
        return
    pending = deque[Future[Any]]()
    failure, more = list[Exception](), True
    with ThreadPoolExecutor(workers) as pool:
        try:
            while more or pending:
                while more and len(pending) < _AHEAD * workers:
                    try:
                        pending.append(pool.submit(work, next(iterator)))
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more = False
                        failure.append(error)
                if pending:
                    yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if failure:
        raise failure[0]
