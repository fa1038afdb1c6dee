"""NF4 with double quantisation: bitsandbytes' own bits, and right values where bitsandbytes is wrong."""

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.quantization import nf4 as nf4_module
from lola_ft.quantization.nf4 import NF4, dequantize, dequantized_tiles, dynamic_code, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALIGNED = [(64, 64), (64, 192), (128, 64), (1, 64), (512, 320)]
# bitsandbytes 0.50's CPU operator dequantises some of these wrongly.
UNALIGNED = [(64, 96), (64, 100), (64, 32), (48, 160), (8, 12), (10, 10), (5, 24), (1, 96), (96, 1), (130, 66)]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[-1])
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def assert_same_bits(weight: torch.Tensor) -> tuple[torch.Tensor, Any, NF4]:
    """Compare all parts with those of bitsandbytes' own call, bit by bit."""
    packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True, blocksize=64)
    nf4 = quantize(weight)
    assert torch.equal(nf4.packed, packed.view(-1))
    assert torch.equal(nf4.absmax, state.absmax)
    assert torch.equal(nf4.absmax2, state.state2.absmax)
    assert torch.equal(nf4.offset, state.offset)
    return packed, state, nf4


def ties() -> torch.Tensor:
    """Return blocks with every level, every midpoint between two levels, and their neighbours in float32."""
    levels = bnb.get_4bit_type("nf4", device="cpu")
    middles = (levels[:-1] + levels[1:]) / 2
    infinity = torch.tensor(torch.inf)
    values = torch.cat([levels, middles, middles.nextafter(infinity), middles.nextafter(-infinity), -middles])
    blocks = [torch.cat([chunk, torch.ones(64 - len(chunk))]) for chunk in values.split(60)]
    return torch.stack([block * scale for block in blocks for scale in (1.0, 0.3, 1e-5, 1e30)])


HARD: dict[str, Callable[[], torch.Tensor]] = {
    "values on the border of two levels": ties,
    "zeros": lambda: torch.zeros(8, 64),
    "blocks of zeros among others": lambda: weight_of((8, 64)) * torch.tensor([1.0, 0.0] * 4)[:, None],
    "negative zeros": lambda: -torch.zeros(2, 64),
    "one value for all": lambda: torch.full((4, 64), -0.37),
    "too small to invert": lambda: weight_of((4, 64)) * 1e-38,
    "as large as can be": lambda: weight_of((4, 64)).sign() * 3e38,
    "one outlier a block": lambda: weight_of((4, 64)) + 1000 * torch.eye(4, 64),
    "more scales than one of their blocks": lambda: weight_of((520, 64)),
    "just below a chunk": lambda: weight_of((510, 64)),
    "a chunk": lambda: weight_of((511, 64)),
    "just above a chunk": lambda: weight_of((512, 64)),
    "three chunks and a bit": lambda: weight_of((1600, 64)),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("stored", DTYPES)
def test_bits_are_bitsandbytes_own_for_hard_values(case: str, stored: torch.dtype) -> None:
    weight = HARD[case]()
    if stored == torch.float16:
        weight = weight.clamp(-60_000, 60_000)  # larger values are infinite in float16
    assert_same_bits(weight.to(stored))


@pytest.mark.parametrize("shape", [*ALIGNED, *UNALIGNED, (64, 8192), (4160, 130), (300, 3000)])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_weight_that_is_stored_transposed_has_the_bits_of_its_copy(
    shape: tuple[int, int], stored: torch.dtype
) -> None:
    assert_same_bits(weight_of(shape[::-1], stored).t())


def test_bits_do_not_depend_on_the_threads() -> None:
    """Only the mean of the scales differs, which torch sums in another order."""
    weight, threads = weight_of((3000, 64)), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = quantize(weight)
        assert_same_bits(weight)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many.packed, quantize(weight).packed)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", ALIGNED)
def test_bits_are_bitsandbytes_own(shape: tuple[int, int], stored: torch.dtype) -> None:
    packed, state, nf4 = assert_same_bits(weight_of(shape, stored))
    expected = bnb.dequantize_4bit(packed, state)
    assert expected.dtype == stored
    assert torch.equal(dequantize(nf4, dynamic_code(), shape, stored), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALIGNED + UNALIGNED)
def test_dequantising_equals_plain_torch(shape: tuple[int, int], dtype: torch.dtype, reference: Any) -> None:
    nf4 = quantize(weight_of(shape))
    actual = dequantize(nf4, dynamic_code(), shape, dtype)
    assert actual.shape == shape
    assert actual.dtype == dtype
    assert torch.equal(actual, reference.dequantize(nf4, shape).to(dtype))


@pytest.mark.parametrize("shape", ALIGNED + UNALIGNED)
def test_quantising_equals_plain_torch(shape: tuple[int, int], reference: Any) -> None:
    weight = weight_of(shape)
    nf4 = quantize(weight)
    assert torch.equal(reference.unpack(nf4, weight.numel()), reference.codes(weight))
    absmax = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    # The 8-bit code's widest gap is 0.0142 of the largest distance from the mean. The error is at most half of it.
    spread = float((absmax - nf4.offset).abs().max())
    assert (reference.scales(nf4) - absmax).abs().max() <= 0.0072 * spread + 1e-7


@pytest.mark.parametrize("shape", ALIGNED + UNALIGNED)
def test_the_parts_have_the_planned_sizes_and_dtypes(shape: tuple[int, int]) -> None:
    nf4 = quantize(weight_of(shape))
    assert (nf4.packed.numel(), nf4.absmax.numel(), nf4.absmax2.numel()) == packed_sizes(shape[0] * shape[1])
    assert [tensor.dtype for tensor in (nf4.packed, nf4.absmax, nf4.absmax2, nf4.offset)] == [
        torch.uint8,
        torch.uint8,
        torch.float32,
        torch.float32,
    ]


def test_a_weight_takes_4_127_bits() -> None:
    packed, absmax, absmax2 = packed_sizes(2048 * 8192)
    assert 8 * (packed + absmax + 4 * absmax2) / (2048 * 8192) == pytest.approx(4.127, abs=0.001)


def test_memory_order_decides_and_a_transposed_view_is_its_contiguous_copy() -> None:
    weight = weight_of((128, 64))
    for a, b in zip(parts(quantize(weight.t())), parts(quantize(weight.t().contiguous())), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(quantize(weight.t()).packed, quantize(weight).packed)


def parts(nf4: NF4) -> tuple[torch.Tensor, ...]:
    return nf4.packed, nf4.absmax, nf4.absmax2, nf4.offset


def test_zeros_stay_zero() -> None:
    """A block of zeros has the scale 0, which must not be a divisor."""
    weight = weight_of((64, 64))
    weight[3] = 0
    dense = dequantize(quantize(weight), dynamic_code(), (64, 64), torch.float32)
    assert torch.isfinite(dense).all()
    assert (dense[3] == 0).all()
    nothing = dequantize(quantize(torch.zeros(64, 64)), dynamic_code(), (64, 64), torch.float32)
    assert (nothing == 0).all()


class OperatorShapes(TorchDispatchMode):
    """Records the shapes that bitsandbytes' operator is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.bitsandbytes.dequantize_4bit.default:
            self.shapes.append(tuple(args[4]))
        return func(*args, **kwargs or {})


def test_bitsandbytes_is_only_asked_for_rows_of_a_block() -> None:
    """The CPU decides if bitsandbytes' operator is wrong for (64, 96), so the tests of values may not find it."""
    nf4 = quantize(weight_of((64, 96)))
    with OperatorShapes() as seen:
        dequantize(nf4, dynamic_code(), (64, 96), torch.float32)
    assert seen.shapes == [(96, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALIGNED + UNALIGNED)
def test_tiles_are_the_rows_of_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_module, "_TILE", 1000)
    nf4 = quantize(weight_of(shape))
    tiles = list(dequantized_tiles(nf4, dynamic_code(), shape, dtype))
    assert torch.equal(torch.cat([tile for _, tile in tiles]), dequantize(nf4, dynamic_code(), shape, dtype))
    assert [start for start, _ in tiles] == [sum(len(tile) for _, tile in tiles[:i]) for i in range(len(tiles))]
    several = dtype == torch.float32 and shape[1] % 64 == 0 and shape[0] > max(1, 1000 // shape[1])
    assert (len(tiles) > 1) == several


def test_the_store_is_not_changed_by_dequantising() -> None:
    nf4 = quantize(weight_of((64, 100)))
    before = [tensor.clone() for tensor in parts(nf4)]
    first, second = (dequantize(nf4, dynamic_code(), (64, 100), torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(parts(nf4), before, strict=True))


# Even numbers of columns, because two values share a byte. No weight of LOLA has an odd number of values.
@given(rows=st.integers(1, 40), columns=st.integers(1, 70).map(lambda n: 2 * n), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_any_shape_comes_back_within_half_a_level(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    dense = dequantize(quantize(weight), dynamic_code(), (rows, columns), torch.float32)
    absmax = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    # Half of the widest gap between levels is 0.152. The scales' own 8 bits add up to 0.0072 of their spread.
    limit = 0.152 * absmax.repeat_interleave(64)[: weight.numel()] + 0.0072 * (absmax.max() - absmax.min()) + 1e-6
    assert ((dense - weight).abs().reshape(-1) <= limit).all()
