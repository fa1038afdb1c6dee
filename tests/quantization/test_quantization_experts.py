"""The 4-bit store of fused experts: its bits, its gradients, and what happens to it in a model's life."""

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
from lola_ft.model.experts import PROJECTIONS, LolaExperts
from lola_ft.quantization import NF4Experts
from lola_ft.quantization import experts as experts_module

Maker = Callable[..., tuple[NF4Experts, dict[str, Tensor]]]
# Last dimensions that are multiples of 64, and ones that are not.
SIZES = [(64, 128), (96, 160), (32, 100)]


def dense_twin(experts: NF4Experts) -> LolaExperts:
    """Dense, frozen experts that hold the dequantised weights."""
    hidden, inner = experts.shapes["up_proj"]
    twin = LolaExperts(hidden, inner, experts.num_experts)
    with torch.no_grad():
        for name in PROJECTIONS:
            for e in range(experts.num_experts):
                getattr(twin, name)[e] = experts.expert_weight(name, e, torch.float32)
            getattr(twin, f"{name}_bias").copy_(getattr(experts, f"{name}_bias"))
    return twin.requires_grad_(False)


def inputs(experts: NF4Experts, tokens: int = 23) -> tuple[Tensor, Tensor, Tensor, dict[str, LowRank]]:
    generator = torch.Generator().manual_seed(tokens)
    hidden, _ = experts.shapes["up_proj"]
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    ids = torch.randint(experts.num_experts, (tokens,), generator=generator)
    probs = torch.rand(tokens, generator=generator).requires_grad_()
    low_rank = {}
    for name, (in_features, out_features) in experts.shapes.items():
        a = torch.randn(experts.num_experts, 3, in_features, generator=generator).requires_grad_()
        b = torch.randn(experts.num_experts, out_features, 3, generator=generator).requires_grad_()
        low_rank[name] = LowRank(a, b)
    return x, ids, probs, low_rank


def run(experts: LolaExperts, batch: tuple[Any, ...]) -> list[Tensor]:
    """Output and the gradients of input, probability and adapters."""
    x, ids, probs, low_rank = batch
    out = experts(x, ids, probs, low_rank)
    leaves = [x, probs, *(factor for path in low_rank.values() for factor in (path.a_ERI, path.b_EOR))]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_expert_is_bit_equal_to_bitsandbytes_on_that_tensor(make_experts: Maker) -> None:
    experts, dense = make_experts()
    for name in PROJECTIONS:
        for e in range(experts.num_experts):
            packed, state = bnb.quantize_4bit(dense[name][e], quant_type="nf4", compress_statistics=True)
            nf4 = experts.stored(name, e)
            assert torch.equal(nf4.packed, packed.view(-1))
            assert torch.equal(nf4.absmax, state.absmax)
            assert torch.equal(nf4.absmax2, state.state2.absmax)
            assert torch.equal(nf4.offset, state.offset)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                state.dtype = dtype
                expected = bnb.dequantize_4bit(packed, state)
                assert torch.equal(experts.expert_weight(name, e, dtype), expected)


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_shapes_that_bitsandbytes_gets_wrong(hidden: int, inner: int, make_experts: Maker, reference: Any) -> None:
    experts, dense = make_experts(hidden, inner)
    for name, shape in experts.shapes.items():
        for e in range(experts.num_experts):
            actual = experts.expert_weight(name, e, torch.float32)
            assert torch.equal(actual, reference.dequantize(experts.stored(name, e), shape))
            # NF4 of normal values keeps most of them: the error's standard deviation is about a tenth of theirs.
            assert (actual - dense[name][e]).std() < 0.15 * dense[name][e].std()


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_forward_and_backward_equal_dense_experts_of_the_same_values(
    hidden: int, inner: int, make_experts: Maker
) -> None:
    experts, _ = make_experts(hidden, inner)
    batch = inputs(experts)
    assert all_equal(run(experts, batch), run(dense_twin(experts), batch))


def test_bfloat16_autocast_equals_dense_experts_of_the_same_values(make_experts: Maker) -> None:
    experts, _ = make_experts()
    batch = inputs(experts)
    twin = dense_twin(experts)
    with torch.autocast("cpu", torch.bfloat16):
        assert all_equal(run(experts, batch), run(twin, batch))


def test_training_after_evaluation_and_dequantising_after_both(make_experts: Maker) -> None:
    """The trap of CPUs with AVX512-BF16: an evaluation repacks bitsandbytes' own layers in place."""
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
    """One token costs two weights, whether there are 4 experts or 64."""
    experts, _ = make_experts(64, 64, num_experts=8)
    calls = []
    real = experts_module.tiles_of
    monkeypatch.setattr(experts_module, "tiles_of", lambda *args: (calls.append(args[2]), real(*args))[1])
    ids = torch.arange(active).repeat(3)
    experts(torch.randn(len(ids), 64), ids, torch.ones(len(ids)))
    assert len(calls) == 2 * active


def test_a_copy_is_equal_and_independent(make_experts: Maker) -> None:
    experts, _ = make_experts()
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


def test_a_copy_of_a_module_that_holds_it(make_experts: Maker) -> None:
    experts, _ = make_experts()
    outer = nn.ModuleDict({"experts": experts, "again": experts})
    twin = copy.deepcopy(outer)
    assert twin["experts"] is twin["again"] is not experts


def test_state_dict_through_a_file(make_experts: Maker, tmp_path: Path) -> None:
    experts, _ = make_experts()
    batch = inputs(experts)
    before = run(experts, batch)
    save_file(experts.state_dict(), tmp_path / "experts.safetensors")
    other, _ = make_experts()
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
def test_a_cast_moves_biases_and_leaves_the_store_alone(cast: str, make_experts: Maker) -> None:
    experts, _ = make_experts()
    before = {name: tensor.clone() for name, tensor in experts.named_buffers()}
    packed = {name: getattr(experts, name).clone() for name in PROJECTIONS}
    weight = experts.expert_weight("down_proj", 2, torch.float32)
    experts = CASTS[cast](experts)
    for name, tensor in experts.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(getattr(experts, name), packed[name]) for name in PROJECTIONS)
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
    one_expert = sum(dense[name][0].numel() * 4 for name in PROJECTIONS)
    rows = 32 * len(ids.unique())
    assert 0 < saved.total <= rows * 4 * (256 + 512 + 2 * 3) + len(ids) * 4 * (256 + 2)
    assert saved.total < one_expert
