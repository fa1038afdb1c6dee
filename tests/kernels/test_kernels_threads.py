"""Work on threads: all items are done, in the caller's modes, and torch's number of threads is restored."""

import threading

import pytest
import torch

from lola_ft.kernels.threads import in_blocks, side_by_side
from tests.kernels.conftest import FORMS
from tests.kernels.test_kernels_experts import LOADS, make_case


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_worked_on_once_by_threads_with_one_thread_each(threads: int) -> None:
    done: list[tuple[int, int, int]] = []
    side_by_side(lambda item: done.append((item, torch.get_num_threads(), threading.get_ident())), range(40))
    assert sorted(item for item, _, _ in done) == list(range(40))
    assert {own for _, own, _ in done} == {1}
    assert (threading.get_ident() in {worker for _, _, worker in done}) == (threads == 1)
    assert torch.get_num_threads() == threads


def test_a_failure_is_raised_and_the_thread_count_restored(threads: int) -> None:
    def fail(item: int) -> None:
        if item == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        side_by_side(fail, range(8))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("inference", [False, True])
def test_autograd_is_off_and_inference_mode_is_the_callers(threads: int, inference: bool) -> None:
    with torch.inference_mode(inference):
        out = torch.zeros(8, 4)

        def fill(item: int) -> None:
            assert not torch.is_grad_enabled()
            out[item] += torch.ones(4, requires_grad=not inference) * item  # a tensor of that mode, changed in place

        side_by_side(fill, range(8))
    assert torch.equal(out, torch.arange(8.0)[:, None].expand(8, 4))
    assert out.is_inference() == inference
    assert torch.get_num_threads() == threads


def test_blocks_cover_every_row_once(threads: int) -> None:  # noqa: ARG001
    count = torch.zeros(1000, dtype=torch.int64)

    def fill(rows: slice) -> None:
        count[rows] += 1

    in_blocks(fill, 1000, count.device, block=96)
    assert count.eq(1).all()


@pytest.mark.parametrize("name", ["lola", "gated, top 3"])
def test_results_have_the_same_bits_on_any_number_of_threads(name: str) -> None:
    """One thread computes an expert, whatever the other threads do. Here three threads share the cores."""
    before, found = torch.get_num_threads(), []
    try:
        for number in (2, 3, 2):
            torch.set_num_threads(number)
            case = make_case(LOADS["more than a bucket"], {"up_proj": 3, "down_proj": 5}, form=FORMS[name])
            out = case.run()
            found.append({"out": out, **case.gradients(out)})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[key], found[0][key]) for key in found[0])
