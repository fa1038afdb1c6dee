"""The 4-bit store of fused experts: its bits and gradients, and copies, casts and files of it."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lola_ft.kernels.stacks import LowRank
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts
from lola_ft.quantization import experts as experts_module
from tests.kernels.conftest import LAYOUTS

Maker = Callable[..., tuple[NF4Experts, dict[str, Tensor]]]
# Last dimensions that are multiples of 64, and others.
SIZES = [(64, 128), (96, 160), (32, 100)]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def dense_twin(experts: NF4Experts) -> FusedExperts:
    """Return dense, frozen experts with the dequantised weights."""
    twin = FusedExperts(**experts.settings)
    for part in experts.parts:
        for e in range(experts.num_experts):
            twin.load_expert(part, e, experts.expert_weight(part, e, torch.float32))
    for name, bias in experts.named_parameters():
        if name.endswith("_bias"):
            twin.get_parameter(name).data.copy_(bias)
    return twin.requires_grad_(False)


def inputs(experts: NF4Experts, tokens: int = 23, top_k: int = 1) -> tuple[Tensor, Tensor, Tensor, dict[str, LowRank]]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, experts.hidden_size, generator=generator).requires_grad_()
    ids = torch.randint(experts.num_experts, (tokens, top_k), generator=generator)
    probs = torch.rand(tokens, top_k, generator=generator).requires_grad_()
    low_rank = {}
    for name, (in_features, out_features) in experts.shapes.items():
        a = torch.randn(experts.num_experts, 3, in_features, generator=generator).requires_grad_()
        b = torch.randn(experts.num_experts, out_features, 3, generator=generator).requires_grad_()
        low_rank[name] = LowRank(a, b)
    return x, ids, probs, low_rank


def run(experts: FusedExperts, batch: tuple[Any, ...]) -> list[Tensor]:
    """Return the output and the gradients of input, probability and adapters."""
    x, ids, probs, low_rank = batch
    out = experts(x, ids, probs, low_rank)
    leaves = [x, probs, *(factor for path in low_rank.values() for factor in (path.a_ERI, path.b_EOR))]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_expert_is_bit_equal_to_bitsandbytes_on_that_tensor(make_experts: Maker, layout: dict[str, Any]) -> None:
    experts, dense = make_experts(**layout)
    assert set(experts.parts) == {"up_proj", "down_proj"} | ({"gate_proj"} if experts.has_gate else set())
    for part in experts.parts:
        for e in range(experts.num_experts):
            packed, state = bnb.quantize_4bit(dense[part][e], quant_type="nf4", compress_statistics=True)
            nf4 = experts.stored(part, e)
            assert torch.equal(nf4.packed, packed.view(-1))
            assert torch.equal(nf4.absmax, state.absmax)
            assert torch.equal(nf4.absmax2, state.state2.absmax)
            assert torch.equal(nf4.offset, state.offset)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                state.dtype = dtype
                expected = bnb.dequantize_4bit(packed, state)
                assert torch.equal(experts.expert_weight(part, e, dtype), expected)


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_shapes_that_bitsandbytes_gets_wrong_are_dequantised_exactly(
    hidden: int, inner: int, layout: dict[str, Any], make_experts: Maker, reference: Any
) -> None:
    experts, dense = make_experts(hidden, inner, **layout)
    for part in experts.parts:
        for e in range(experts.num_experts):
            actual = experts.expert_weight(part, e, torch.float32)
            assert torch.equal(actual, reference.dequantize(experts.stored(part, e), experts.part_shape(part)))
            # For normal values, the standard deviation of NF4's error is about a tenth of theirs.
            assert (actual - dense[part][e]).std() < 0.15 * dense[part][e].std()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_forward_and_backward_equal_dense_experts_of_the_same_values(
    hidden: int, inner: int, top_k: int, layout: dict[str, Any], make_experts: Maker
) -> None:
    experts, _ = make_experts(hidden, inner, **layout)
    batch = inputs(experts, top_k=top_k)
    actual, expected = run(experts, batch), run(dense_twin(experts), batch)
    if not experts.has_gate:
        assert all_equal(actual, expected)
    for got, wanted in zip(actual, expected, strict=True):
        # In 4 bit, gate and up are separate products, so the gradient of x is summed in another order.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_names_and_shapes_of_the_store_are_those_of_every_cache(make_experts: Maker) -> None:
    """Names and shapes are those that earlier versions wrote for LOLA. Gate and up have their own dimension."""
    plain, _ = make_experts(64, 128, 3)
    n = 64 * 128
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert shapes == {
        **{f"{name}_proj": (3, n // 2) for name in ("up", "down")},
        **{f"{name}_proj_absmax": (3, n // 64) for name in ("up", "down")},
        **{f"{name}_proj_absmax2": (3, 1) for name in ("up", "down")},
        **{f"{name}_proj_offset": (3,) for name in ("up", "down")},
        "up_proj_bias": (3, 128),
        "down_proj_bias": (3, 64),
    }
    gated, _ = make_experts(64, 128, 3, **LAYOUTS["gated"])
    shapes = {name: tuple(tensor.shape) for name, tensor in gated.state_dict().items() if "gate_up" in name}
    assert shapes == {
        "gate_up_proj": (3, 2, n // 2),
        "gate_up_proj_absmax": (3, 2, n // 64),
        "gate_up_proj_absmax2": (3, 2, 1),
        "gate_up_proj_offset": (3, 2),
    }


@pytest.mark.parametrize("top_k", [1, 3])
def test_bfloat16_autocast_equals_dense_experts_of_the_same_values(
    top_k: int, layout: dict[str, Any], make_experts: Maker
) -> None:
    experts, _ = make_experts(**layout)
    batch = inputs(experts, top_k=top_k)
    twin = dense_twin(experts)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(experts, batch), run(twin, batch)
    if not experts.has_gate or experts.is_transposed:
        assert all_equal(actual, expected)
    for got, wanted in zip(actual, expected, strict=True):
        # With gate and up one below another, the gradient of x is rounded once more, to 8 bits of mantissa.
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))


def test_evaluation_changes_neither_training_nor_dequantising(make_experts: Maker) -> None:
    """On CPUs with AVX512-BF16, an evaluation repacks bitsandbytes' own layers in place."""
    experts, _ = make_experts()
    batch = inputs(experts)
    before, weights = (
        run(experts.train(), batch),
        [experts.expert_weight("up_proj", e, torch.float32) for e in range(4)],
    )
    experts.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        experts(*batch[:3])
    with torch.inference_mode():
        experts(*batch[:3])
    assert all_equal(run(experts.train(), batch), before)
    assert all_equal([experts.expert_weight("up_proj", e, torch.float32) for e in range(4)], weights)


def test_frozen_weights_want_and_get_no_gradient(make_experts: Maker) -> None:
    experts, _ = make_experts()
    x, ids, probs, low_rank = inputs(experts)
    experts(x, ids, probs, low_rank).sum().backward()
    assert x.grad is not None
    for _, parameter in experts.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("active", [1, 2, 5])
def test_only_active_experts_are_dequantised(active: int, make_experts: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token costs two weights, with 4 experts or with 64."""
    experts, _ = make_experts(64, 64, num_experts=8)
    calls = []
    real = experts_module.tiles_of
    monkeypatch.setattr(experts_module, "tiles_of", lambda *args: (calls.append(args[2]), real(*args))[1])
    ids = torch.arange(active).repeat(3)[:, None]
    experts(torch.randn(len(ids), 64), ids, torch.ones(ids.shape))
    assert len(calls) == 2 * active


def test_a_copy_is_equal_and_independent(make_experts: Maker, layout: dict[str, Any]) -> None:
    experts, _ = make_experts(**layout)
    batch = inputs(experts)
    before = run(experts, batch)
    twin = copy.deepcopy(experts.eval())
    assert type(twin) is NF4Experts
    assert not twin.training
    assert all_equal(run(twin, batch), before)
    own = {tensor.data_ptr() for tensor in experts.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in twin.state_dict().values()}
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in experts.parameters()]
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert all_equal(run(experts, batch), before)


def test_a_copied_parent_module_holds_one_copy(make_experts: Maker) -> None:
    experts, _ = make_experts()
    outer = nn.ModuleDict({"experts": experts, "again": experts})
    twin = copy.deepcopy(outer)
    assert twin["experts"] is twin["again"] is not experts


def test_a_state_dict_survives_a_file(make_experts: Maker, layout: dict[str, Any], tmp_path: Path) -> None:
    experts, _ = make_experts(**layout)
    batch = inputs(experts)
    before = run(experts, batch)
    save_file(experts.state_dict(), tmp_path / "experts.safetensors")
    other, _ = make_experts(**layout)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not all_equal(run(other, batch), before)
    other.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    assert all_equal(run(other, batch), before)


def test_pickling_is_refused(make_experts: Maker, tmp_path: Path) -> None:
    experts, _ = make_experts()
    for attempt in (
        lambda: pickle.dumps(experts),
        lambda: torch.save(experts, tmp_path / "experts.pt"),
        lambda: pickle.dumps(nn.Sequential(experts)),
    ):
        with pytest.raises(TypeError, match="not pickled; save their state_dict as safetensors"):
            attempt()


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to float16": lambda module: module.to(torch.float16),
    "to bfloat16": lambda module: module.to(dtype=torch.bfloat16),
    "to float64": lambda module: module.to(torch.float64),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "within another module": lambda module: nn.Sequential(module).half()[0],
    "there and back": lambda module: module.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_biases_and_not_the_store(cast: str, make_experts: Maker) -> None:
    experts, _ = make_experts()
    before = {name: tensor.clone() for name, tensor in experts.named_buffers()}
    packed = {name: getattr(experts, name).clone() for name in experts.shapes}
    weight = experts.expert_weight("down_proj", 2, torch.float32)
    experts = CASTS[cast](experts)
    for name, tensor in experts.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(getattr(experts, name), packed[name]) for name in experts.shapes)
    assert torch.equal(experts.expert_weight("down_proj", 2, torch.float32), weight)
    expected = experts.up_proj_bias.dtype
    if "back" not in cast and cast != "float":
        assert expected != torch.float32
    x, ids, probs, _ = inputs(experts)
    assert experts(x.to(expected), ids, probs.to(expected)).dtype == expected


def test_nothing_dense_is_kept_for_backward(make_experts: Maker, saved_bytes: Any) -> None:
    experts, dense = make_experts(256, 512, num_experts=8)
    x, ids, probs, low_rank = inputs(experts, tokens=8)
    factors = [factor for path in low_rank.values() for factor in (path.a_ERI, path.b_EOR)]
    with saved_bytes(x, probs, *factors, *experts.parameters(), *experts.buffers()) as saved:
        out = experts(x, ids, probs, low_rank)
    saved.add_contexts(out)
    one_expert = sum(dense[name][0].numel() * 4 for name in experts.shapes)
    rows = 32 * len(ids.unique())
    assert 0 < saved.total <= rows * 4 * (256 + 512 + 2 * 3) + len(ids) * 4 * (256 + 2)
    assert saved.total < one_expert
