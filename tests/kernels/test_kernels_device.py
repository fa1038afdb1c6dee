"""The GPU's ways of running experts, on the CPU: torch's grouped products, and our Triton kernels interpreted.

Shapes: T tokens, D hidden, F inner, E experts, R rank.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from lola_ft.kernels import experts as kernel
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.grouping import fitting_tile_rows, group_on_device
from lola_ft.kernels.products import GroupedMatmuls, Products
from lola_ft.kernels.stacks import LowRank
from lola_ft.kernels.triton_products import TritonProducts
from lola_ft.model.experts import LolaExperts
from lola_ft.quantization import NF4Experts

WAYS: dict[str, Products] = {"grouped": GroupedMatmuls(), "triton": TritonProducts(block_n=64, block_k=64)}
WIDE = TritonProducts(block_n=128, block_k=128)
LOADS = {
    "spread": [3, 0, 1, 1, 3, 2, 0, 0, 3, 1, 2],
    "empty experts": [2, 0, 2, 2],
    "one token": [1],
    "all tokens to one expert": [3] * 37,
    "several tiles": [0] * 33 + [2] * 20 + [3] * 9,
}
SIZES = (64, 128, 4)


def make_experts(kind: str, sizes: tuple[int, int, int] = SIZES) -> LolaExperts:
    hidden, inner, num_experts = sizes
    generator = torch.Generator().manual_seed(0)
    experts = (NF4Experts if kind == "nf4" else LolaExperts)(hidden, inner, num_experts)
    if isinstance(experts, NF4Experts):
        experts.allocate(torch.device("cpu"))
    for name, shape in experts.shapes.items():
        for e in range(num_experts):
            weight = torch.randn(shape, generator=generator) * 0.3
            if isinstance(experts, NF4Experts):
                experts.load_expert(name, e, weight)
            else:
                getattr(experts, name).data[e] = weight
        bias = getattr(experts, f"{name}_bias")
        bias.data = torch.randn(bias.shape, generator=generator)
    return experts


def outcome(run: Any, experts: LolaExperts, ids: list[int], rank: int, chosen: tuple[int, ...] | None) -> list[Tensor]:
    """Output and the gradients of everything that wants one."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).requires_grad_()

    x, probs = random(len(ids), experts.shapes["up_proj"][0]), random(len(ids))
    leaves, paths = [x, probs, *(p for p in experts.parameters() if p.requires_grad)], {}
    for name, (inputs, outputs) in experts.shapes.items():
        if rank:
            with_lora = len(chosen) if chosen else experts.num_experts
            # A permuted view, as PEFT's layout of B gives it.
            a, b = random(with_lora, rank, inputs), random(outputs, rank, with_lora)
            paths[name] = LowRank(a, b.permute(2, 0, 1), expert_ids=chosen)
            leaves += [a, b]
    out = run(experts, x, torch.tensor(ids), probs, paths)
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of up to 192 products in another order


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_equals_the_loop_in_4_bit(way: Products, load: list[int]) -> None:
    experts = make_experts("nf4")
    expected = outcome(run_experts, experts, load, 5, None)
    same(outcome(lambda *given: run_experts(*given, products=way), experts, load, 5, None), expected)


@pytest.mark.parametrize("rank", [0, 1, 8, 17])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_rank(way: Products, rank: int) -> None:
    experts = make_experts("nf4")
    expected = outcome(run_experts, experts, LOADS["spread"], rank, None)
    same(outcome(lambda *given: run_experts(*given, products=way), experts, LOADS["spread"], rank, None), expected)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_some_experts_have_lora(way: Products) -> None:
    experts = make_experts("nf4")
    expected = outcome(run_experts, experts, LOADS["spread"], 4, (1, 3))
    same(outcome(lambda *given: run_experts(*given, products=way), experts, LOADS["spread"], 4, (1, 3)), expected)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_dense_weights_and_biases_are_trained_too(load: list[int]) -> None:
    experts = make_experts("dense", (24, 40, 4))
    expected = outcome(run_experts, experts, load, 3, None)
    same(outcome(lambda *given: run_experts(*given, products=GroupedMatmuls()), experts, load, 3, None), expected)


def test_trained_biases_on_4_bit_weights() -> None:
    experts = make_experts("nf4")
    experts.up_proj_bias.requires_grad_()
    experts.down_proj_bias.requires_grad_()
    expected = outcome(run_experts, experts, LOADS["spread"], 4, None)
    same(
        outcome(lambda *given: run_experts(*given, products=WAYS["triton"]), experts, LOADS["spread"], 4, None),
        expected,
    )


@pytest.mark.parametrize("sizes", [(128, 64, 3), (192, 320, 5), (64, 1088, 2)], ids=str)
def test_other_sizes(sizes: tuple[int, int, int]) -> None:
    """The last has superblocks of scales that are full, and one that is not."""
    experts, load = make_experts("nf4", sizes), [0, 1, 1, 0, 1]
    expected = outcome(run_experts, experts, load, 4, None)
    for way in (GroupedMatmuls(), WIDE):
        same(outcome(lambda *given, way=way: run_experts(*given, products=way), experts, load, 4, None), expected)


@pytest.mark.parametrize("way", ["triton", "grouped"])
def test_dropout_is_the_plain_formula(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the masks that were drawn, output and gradients are those of `x @ W + (x * mask) @ A.T @ B.T`."""
    experts, ids, rank, p = make_experts("nf4"), LOADS["spread"], 4, 0.4
    masks: list[Tensor] = []
    real = kernel._keep
    monkeypatch.setattr(kernel, "_keep", lambda *given: masks.append(real(*given)) or masks[-1])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor(ids)
    leaves = [torch.randn(len(ids), 64, generator=generator), torch.rand(len(ids), generator=generator)]
    for inputs, outputs in experts.shapes.values():
        leaves += [
            torch.randn(4, rank, inputs, generator=generator),
            torch.randn(4, outputs, rank, generator=generator),
        ]
    leaves = [leaf.mul(0.3).requires_grad_() for leaf in leaves]
    x, probs, a_up, b_up, a_down, b_down = leaves
    paths = {"up_proj": LowRank(a_up, b_up, p), "down_proj": LowRank(a_down, b_down, p)}
    out = run_experts(experts, x, tokens, probs, paths, WAYS[way])
    assert len(masks) == 2
    assert 0.5 < masks[1].float().mean() < 0.7
    groups = group_on_device(tokens, 4, fitting_tile_rows(len(ids), 4))
    plain = []
    for t, e in enumerate(ids):
        keep_up, keep_down = (mask[groups.row_of_token_T[t]] / (1 - p) for mask in masks)
        up, down = (experts.expert_weight(name, e, torch.float32) for name in experts.shapes)
        pre = x[t] @ up + experts.up_proj_bias[e] + b_up[e] @ (a_up[e] @ (x[t] * keep_up))
        act = torch.nn.functional.gelu(pre, approximate="tanh")
        plain.append((act @ down + experts.down_proj_bias[e] + b_down[e] @ (a_down[e] @ (act * keep_down))) * probs[t])
    expected = torch.stack(plain)
    weights = torch.randn(out.shape, generator=generator)
    same([out, *torch.autograd.grad(out, leaves, weights)], [expected, *torch.autograd.grad(expected, leaves, weights)])


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_weights_decoded_inside_are_those_dequantised_whole(name: str) -> None:
    """Rows of the identity times the weight give the weight itself, bit for bit."""
    experts = make_experts("nf4", (64, 192, 2))
    inputs = experts.shapes[name][0]
    ids = torch.arange(2).repeat_interleave(inputs)
    groups = group_on_device(ids, 2, 64)
    rows = torch.zeros(groups.num_rows, inputs).index_copy_(0, groups.row_of_token_T, torch.eye(inputs).repeat(2, 1))
    bias = torch.zeros(2, experts.shapes[name][1])
    out = WAYS["triton"].times(rows, experts.weights(name), groups, bias, None)[groups.row_of_token_T]
    dense = torch.cat([experts.expert_weight(name, e, torch.float32) for e in range(2)])
    assert torch.equal(out, dense)
    assert torch.equal(experts.weights(name).dense(torch.float32).flatten(0, 1), dense)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_groups_are_whole_tiles(load: list[int], tile_rows: int) -> None:
    ids = torch.tensor(load)
    groups = group_on_device(ids, 4, tile_rows)
    rows = groups.row_of_token_T
    assert rows.unique().numel() == len(load)
    assert int(rows.max()) < int(groups.ends_E[-1]) <= groups.num_rows
    assert torch.equal(groups.expert_of_row()[rows], ids)
    assert torch.equal(groups.expert_of_tile[rows // tile_rows].long(), ids)
    assert (groups.starts_E % tile_rows == 0).all()
    for e in range(4):
        own = rows[ids == e]
        assert torch.equal(own, groups.starts_E[e] + torch.arange(own.numel()))  # in the tokens' order


def test_tile_rows_follow_the_load() -> None:
    assert [fitting_tile_rows(tokens, 16) for tokens in (1, 256, 512, 1024, 65536)] == [16, 16, 32, 64, 128]


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """No GPU is needed for that: types, shapes and shared memory (227 KB a block) are right, and matrix units used."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 8
    assert all(kernel["matrix_instructions"] > 0 for kernel in kernels)
    assert all(kernel["shared_bytes"] <= 227 * 1024 for kernel in kernels)
