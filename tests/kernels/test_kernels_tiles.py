"""Products with a weight in tiles."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lola_ft.kernels.tiles import Tiles, one_below_another, side_by_side, times, times_transposed

WEIGHT = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))


def tiles(step: int) -> Tiles:
    return ((start, WEIGHT[start : start + step].clone()) for start in range(0, 37, step))


@pytest.mark.parametrize("step", [1, 10, 36, 37, 64])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_products_are_those_with_the_whole_weight(rows: int, step: int) -> None:
    x_NI, x_NO, bias = torch.randn(rows, 37), torch.randn(rows, 24), torch.randn(37)
    garbage = torch.full((rows, 37), torch.nan)
    assert_close(times(x_NI, tiles(step), torch.full((rows, 24), torch.nan)), x_NI @ WEIGHT, atol=1e-5, rtol=1e-5)
    assert_close(times_transposed(x_NO, tiles(step), garbage.clone()), x_NO @ WEIGHT.t())
    assert_close(times_transposed(x_NO, tiles(step), garbage.clone(), bias), x_NO @ WEIGHT.t() + bias)
    sums = torch.ones(rows, 24), torch.ones(rows, 37)
    assert_close(times(x_NI, tiles(step), sums[0], add=True), x_NI @ WEIGHT + 1, atol=1e-5, rtol=1e-5)
    assert_close(times_transposed(x_NO, tiles(step), sums[1], add=True), x_NO @ WEIGHT.t() + 1)


@pytest.mark.parametrize("step", [1, 10, 37])
def test_tiles_of_two_weights_are_those_of_the_joined_weight(step: int) -> None:
    below, beside = one_below_another([tiles(step), tiles(step)], 37), side_by_side([tiles(step), tiles(step)])
    assert torch.equal(torch.cat([tile for _, tile in below]), torch.cat([WEIGHT, WEIGHT]))
    assert torch.equal(torch.cat([tile for _, tile in beside]), torch.cat([WEIGHT, WEIGHT], 1))
    x = torch.randn(5, 74)
    below = one_below_another([tiles(step), tiles(step)], 37)
    assert_close(times(x, below, torch.full((5, 24), torch.nan)), x @ torch.cat([WEIGHT, WEIGHT]), atol=1e-5, rtol=1e-5)


def test_the_result_may_be_rows_of_a_larger_buffer() -> None:
    buffer = torch.zeros(12, 24)
    x: Tensor = torch.randn(5, 37)
    result = times(x, tiles(10), buffer[4:9])
    assert result.data_ptr() == buffer[4:].data_ptr()
    assert_close(buffer[4:9], x @ WEIGHT, atol=1e-5, rtol=1e-5)
    assert buffer[:4].eq(0).all()
    assert buffer[9:].eq(0).all()
