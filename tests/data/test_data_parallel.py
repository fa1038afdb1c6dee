"""Several threads give what one gives: the same rows in the same order, and the same first mistake."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lola_ft.data import Example, Template, encode
from lola_ft.data.example import prompt_fields
from lola_ft.data.parallel import map_in_order
from lola_ft.errors import DataError
from lola_ft.nano.build import train_tokenizer


def late_first(number: int) -> int:
    time.sleep(0.02 if number % 3 == 1 else 0)
    return number


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(workers: int) -> None:
    assert list(map_in_order(late_first, range(20), workers)) == list(range(20))
    assert list(map_in_order(late_first, [], workers)) == []


def test_only_a_few_batches_are_read_ahead() -> None:
    read, workers = itertools.count(), set[threading.Thread]()

    def work(number: int) -> int:
        workers.add(threading.current_thread())
        return late_first(number)

    results = map_in_order(work, (next(read) for _ in range(1000)), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert next(read) <= 8
    results.close()  # type: ignore[attr-defined]
    workers.remove(threading.current_thread())  # it does the first item
    assert 1 <= len(workers) <= 2
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_mistake_is_the_one_that_is_raised(workers: int) -> None:
    def items() -> Iterator[int]:
        yield from range(6)
        raise DataError("the reader's, after row 5")

    def work(number: int) -> int:
        time.sleep(0.02)
        if number == 4:
            raise DataError("row 4's")
        return number

    seen = []
    with pytest.raises(DataError, match="row 4's"):
        seen.extend(map_in_order(work, items(), workers))
    with pytest.raises(DataError, match="the reader's"):
        list(map_in_order(late_first, items(), workers))


@pytest.mark.slow
def test_one_thread_two_threads_and_a_file_give_equal_rows(tmp_path: Path) -> None:
    tokenizer, template = train_tokenizer(["one two three four"], 320, 128), Template.load("alpaca")
    rows = [
        Example(prompt_fields(f"Count to {n}"), "one two " * (n % 40 + 1), ("en", "sw")[n % 2], f"row {n}")
        for n in range(3500)
    ]
    one = encode(rows, tokenizer, template, 200)
    two = encode(rows, tokenizer, template, 200, workers=2)
    filed = encode(rows, tokenizer, template, 200, file=tmp_path / "rows.arrow", workers=3)
    assert 0 < one.report.total.dropped < 3500
    for other in (two, filed):
        assert other.dataset.to_dict() == one.dataset.to_dict()
        assert other.dataset._fingerprint == one.dataset._fingerprint
        assert other.languages == one.languages
        assert other.report == one.report
    assert filed.dataset.cache_files == []  # what is derived from it leaves no files beside
