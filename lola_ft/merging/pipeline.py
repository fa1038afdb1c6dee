"""A pipeline that reads, computes and writes at the same time, with few pieces in memory."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

_DEPTH = 3  # most pieces that are read ahead, and most that wait to be written


def run_pipeline(source: Iterable[T], work: Callable[[T], U], sink: Callable[[U], None]) -> None:
    """Call `sink(work(item))` for every item, in order. One thread reads the source, another one calls the sink.

    Source and sink have one thread each, so that neither needs a lock. An error in source, work or sink ends all three
    and is raised.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            _run(iter(source).__next__, work, sink, reader, writer)
        finally:
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)


def _run(
    read: Callable[[], T],
    work: Callable[[T], U],
    sink: Callable[[U], None],
    reader: ThreadPoolExecutor,
    writer: ThreadPoolExecutor,
) -> None:
    def read_one() -> tuple[T] | None:
        try:
            return (read(),)
        except StopIteration:  # a future cannot carry it
            return None

    reads: deque[Future[tuple[T] | None]] = deque(reader.submit(read_one) for _ in range(_DEPTH))
    writes: deque[Future[None]] = deque()
    while (item := reads.popleft().result()) is not None:
        reads.append(reader.submit(read_one))
        writes.append(writer.submit(sink, work(item[0])))
        if len(writes) > _DEPTH:
            writes.popleft().result()
    for write in writes:
        write.result()
