"""The pipeline keeps the order with three threads, loses and repeats nothing, and ends at any error."""

import threading
from collections.abc import Iterator

import pytest
import torch

from lola_ft.merging.buffers import Buffers
from lola_ft.merging.pipeline import run_pipeline


def test_everything_arrives_in_order() -> None:
    arrived: list[int] = []
    run_pipeline(range(1000), lambda i: 2 * i, arrived.append)
    assert arrived == [2 * i for i in range(1000)]


def test_an_empty_source_calls_nothing() -> None:
    run_pipeline(iter(()), lambda item: item, pytest.fail)


def test_reading_and_writing_have_threads_of_their_own() -> None:
    threads: dict[str, set[int]] = {"read": set(), "work": set(), "write": set()}

    def source() -> Iterator[int]:
        for i in range(50):
            threads["read"].add(threading.get_ident())
            yield i

    def note(where: str, item: int) -> int:
        threads[where].add(threading.get_ident())
        return item

    run_pipeline(source(), lambda i: note("work", i), lambda i: note("write", i) and None)
    assert threads["work"] == {threading.get_ident()}
    assert len(threads["read"] | threads["work"] | threads["write"]) == 3


def test_few_items_are_on_their_way_at_a_time() -> None:
    read, most = [0], [0]
    written = [0]

    def source() -> Iterator[int]:
        for i in range(200):
            read[0] += 1
            most[0] = max(most[0], read[0] - written[0])
            yield i

    def sink(_: int) -> None:
        written[0] += 1

    run_pipeline(source(), lambda i: i, sink)
    assert 0 < most[0] <= 9


@pytest.mark.parametrize("where", ["read", "work", "write"])
def test_an_error_anywhere_is_raised(where: str) -> None:
    def fail(here: str, item: int) -> int:
        if here == where and item == 5:
            raise OSError(28, f"{where} failed")
        return item

    written: list[int] = []
    before = set(threading.enumerate())
    with pytest.raises(OSError, match=f"{where} failed"):
        run_pipeline(
            (fail("read", i) for i in range(1000)),
            lambda i: fail("work", i),
            lambda i: written.append(fail("write", i)),
        )
    assert len(written) < 20
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")]


def test_buffers_are_reused_and_other_tensors_ignored() -> None:
    buffers = Buffers()
    first = buffers.take(8, torch.float32)
    place = first.data_ptr()
    other = buffers.take(8, torch.float32)
    assert other.data_ptr() != place
    buffers.give_back(first)
    buffers.give_back(torch.empty(8))
    assert buffers.take(16, torch.bfloat16).data_ptr() == place
    assert buffers.take(4, torch.float32).data_ptr() not in (place, other.data_ptr())
    assert buffers.take(100, torch.float64).numel() == 100
