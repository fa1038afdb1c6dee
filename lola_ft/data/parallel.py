"""Work on batches in several threads. Results come in the order of the batches, and so does the first error.

Threads are used, not processes: tokenising runs outside Python's lock on all cores, while another thread does Python's
part of the work. Each process would load the libraries again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2
"""Batches per thread that are in work or waiting at a time."""


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `map(work, items)`, computed in `workers` threads.

    The first item is done before the threads start, because a tokenizer's first call sets it up. An error while reading
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
