"""The 4-bit linear layer: bitsandbytes' bits in its weight, lola_ft's own forward and backward."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lola_ft.quantization import NF4Linear

SIZES = [(64, 192), (96, 32), (100, 160), (160, 100), (10, 6)]


def make_layer(in_features: int = 64, out_features: int = 192) -> tuple[NF4Linear, Tensor]:
    """Return a frozen layer and the dense weight (out, in) that it was quantised from."""
    generator = torch.Generator().manual_seed(in_features)
    layer = NF4Linear(in_features, out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.1
    layer.load_dense(weight)
    layer.bias = nn.Parameter(torch.randn(out_features, generator=generator), requires_grad=False)
    return layer, weight


def run(layer: Callable[[Tensor], Tensor], in_features: int = 64) -> list[Tensor]:
    """Return the output and the gradient of the input."""
    x = torch.randn(2, 5, in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


def test_the_weight_is_bitsandbytes_own() -> None:
    layer, weight = make_layer()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert isinstance(layer, bnb.nn.Linear4bit)  # PEFT and other tools recognise this class
    assert isinstance(layer.weight, bnb.nn.Params4bit)
    assert torch.equal(layer.weight.data, packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        expected = bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(layer.dense_weight(dtype), expected)


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
def test_forward_and_backward_equal_a_dense_layer_of_the_same_values(in_features: int, out_features: int) -> None:
    layer, weight = make_layer(in_features, out_features)
    dense = layer.dense_weight(torch.float32)
    # For normal values, the standard deviation of NF4's error is about a tenth of theirs.
    assert (dense - weight).std() < 0.15 * weight.std()
    expected = run(lambda x: F.linear(x, dense, layer.bias), in_features)
    for got, wanted in zip(run(layer, in_features), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_autocast_equals_a_dense_layer_of_the_same_values() -> None:
    layer, _ = make_layer()
    dense = layer.dense_weight(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(layer)
        expected = run(lambda x: F.linear(x, dense, layer.bias))
    assert actual[0].dtype == torch.bfloat16
    assert actual[1].dtype == torch.float32
    for got, wanted in zip(actual, expected, strict=True):
        # 8 bits of mantissa, relative to the largest entry.
        assert (got.float() - wanted.float()).abs().max() < 0.02 * wanted.float().abs().max()


def test_only_what_wants_a_gradient_gets_one() -> None:
    layer, _ = make_layer()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((192,), 3.0))
    assert layer.weight.grad is None


@pytest.mark.parametrize("forced", [False, True])
def test_evaluation_changes_neither_training_nor_dequantising(forced: bool) -> None:
    """bitsandbytes' evaluation forward repacks the weight on CPUs with AVX512-BF16. `forced` simulates such a CPU."""
    layer, _ = make_layer()
    assert not layer.support_avx512bf16_for_cpu
    layer.support_avx512bf16_for_cpu = forced
    packed, dense, before = layer.weight.data.clone(), layer.dense_weight(torch.float32), run(layer.train())
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(4, 64))
        layer(torch.randn(1, 64).bfloat16())
    with torch.inference_mode():
        layer(torch.randn(4, 64))
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.dense_weight(torch.float32), dense)
    after = run(layer.train())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_copy_is_equal_and_independent() -> None:
    layer, _ = make_layer()
    before = run(layer)
    twin = copy.deepcopy(layer)
    assert type(twin) is NF4Linear
    assert all(torch.equal(a, b) for a, b in zip(run(twin), before, strict=True))
    twin.weight.data.zero_()
    twin.weight.quant_state.absmax.zero_()
    twin.weight.quant_state.state2.absmax.zero_()
    twin.weight.quant_state.offset.zero_()
    assert all(torch.equal(a, b) for a, b in zip(run(layer), before, strict=True))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to float16": lambda module: module.to(torch.float16),
    "to bfloat16": lambda module: module.to(dtype=torch.bfloat16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "within another module": lambda module: nn.Sequential(module).half()[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_the_bias_and_not_the_weight(cast: str) -> None:
    layer, _ = make_layer()
    packed, dense = layer.weight.data.clone(), layer.dense_weight(torch.float32)
    layer = CASTS[cast](layer)
    assert isinstance(layer.weight, bnb.nn.Params4bit)
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.dense_weight(torch.float32), dense)
    state = layer.weight.quant_state
    assert [t.dtype for t in (state.state2.absmax, state.offset, state.state2.code)] == [torch.float32] * 3
    assert layer.bias.dtype in (torch.float16, torch.bfloat16)
    assert layer(torch.randn(2, 64).to(layer.bias.dtype)).dtype == layer.bias.dtype


def test_nothing_dense_is_kept_for_backward(saved_bytes: Any) -> None:
    layer, weight = make_layer(256, 512)
    x = torch.randn(4, 256, requires_grad=True)
    with saved_bytes(x, layer.weight, layer.bias) as saved:
        out = layer(x).square()  # the square saves the output, so that there are bytes to count
    saved.add_contexts(out)
    assert saved.total == out.numel() * 4 < weight.numel() * 4 / 50


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("trained_bias", [False, True])
def test_lora_in_the_same_pass_equals_the_plain_formula(dropped: bool, trained_bias: bool) -> None:
    layer, _ = make_layer()
    layer.bias.requires_grad_(trained_bias)
    dense = layer.dense_weight(torch.float32)
    generator = torch.Generator().manual_seed(2)
    x, a, b = (torch.randn(size, generator=generator).requires_grad_() for size in ((2, 5, 64), (3, 64), (192, 3)))
    mask = (torch.rand(2, 5, 64, generator=generator) < 0.7) / 0.7

    def dropout(inputs: Tensor) -> Tensor:
        return inputs * mask if dropped else inputs

    leaves = [x, a, b] + ([layer.bias] if trained_bias else [])
    expected = F.linear(x, dense, layer.bias) + dropout(x) @ a.t() @ b.t()
    got = layer.forward_with_lora(x, a, b, dropout)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for mine, plain in zip(torch.autograd.grad(got.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)  # sums of up to 192 squares


def test_lora_in_the_same_pass_trains_if_the_input_wants_no_gradient() -> None:
    layer, _ = make_layer()
    x, a, b = torch.randn(4, 64), torch.randn(3, 64, requires_grad=True), torch.randn(192, 3, requires_grad=True)
    layer.forward_with_lora(x, a, b, nn.Identity()).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(b.grad, (x @ a.detach().t()).sum(0).expand(192, 3))
