"""The GPU's ways of running experts, run on the CPU: torch's grouped products, and the Triton kernels interpreted.

Shape suffixes: T tokens, K choices per token, D hidden, F inner, E experts, R rank.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

pytest.importorskip("triton", reason="needs Triton")

from lola_ft.kernels import experts as kernel
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.grouping import fitting_tile_rows, group_on_device
from lola_ft.kernels.launch_settings import Launch
from lola_ft.kernels.products import GroupedMatmuls, Products
from lola_ft.kernels.stacks import LowRank
from lola_ft.kernels.triton_products import TritonProducts
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts
from tests.grids import slow_but
from tests.kernels.conftest import FORMS, LOLA, Form, choices

WAYS: dict[str, Products] = {"grouped": GroupedMatmuls(), "triton": TritonProducts(Launch(64, 64, 8, 3))}
WIDE = TritonProducts(Launch(128, 128, 8, 3))
LOADS = {
    "spread": [3, 0, 1, 1, 3, 2, 0, 0, 3, 1, 2],
    "empty experts": [2, 0, 2, 2],
    "one token": [1],
    "all tokens to one expert": [3] * 37,
    "several tiles": [0] * 33 + [2] * 20 + [3] * 9,
}
SIZES = (64, 128, 4)
_FEW = ("spread", "one token")
_WITH_BIASES = "gated with biases, in x out, top 2"


def make_experts(kind: str, sizes: tuple[int, int, int] = SIZES, form: Form = LOLA) -> FusedExperts:
    generator = torch.Generator().manual_seed(0)
    experts = (NF4Experts if kind == "nf4" else FusedExperts)(*sizes, **form.settings)
    if isinstance(experts, NF4Experts):
        experts.allocate(torch.device("cpu"))
    for part in experts.parts:
        for e in range(experts.num_experts):
            experts.load_expert(part, e, torch.randn(experts.part_shape(part), generator=generator) * 0.3)
    for name, bias in experts.named_parameters():
        if name.endswith("_bias"):
            bias.data = torch.randn(bias.shape, generator=generator)
    return experts


def outcome(
    run: Any,
    experts: FusedExperts,
    ids: list[int],
    rank: int,
    chosen: tuple[int, ...] | None,
    top_k: int = 1,
    dropout: float = 0.0,
) -> list[Tensor]:
    """Return the output and the gradients of all tensors that want one."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).requires_grad_()

    x, probs = random(len(ids), experts.hidden_size), random(len(ids), top_k)
    leaves, paths = [x, probs, *(p for p in experts.parameters() if p.requires_grad)], {}
    for name, (inputs, outputs) in experts.shapes.items():
        if rank:
            with_lora = len(chosen) if chosen else experts.num_experts
            # A permuted view, as from PEFT's layout of B.
            a, b = random(with_lora, rank, inputs), random(outputs, rank, with_lora)
            paths[name] = LowRank(a, b.permute(2, 0, 1), dropout, expert_ids=chosen)
            leaves += [a, b]
    out = run(experts, x, choices(ids, top_k, experts.num_experts), probs, paths)
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of up to 192 products have another order


@pytest.mark.parametrize("load", slow_but(["empty experts", "several tiles"], LOADS))
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_equals_the_loop_in_4_bit(way: Products, load: str) -> None:
    experts, ids = make_experts("nf4"), LOADS[load]
    expected = outcome(run_experts, experts, ids, 5, None)
    same(outcome(partial(run_experts, products=way), experts, ids, 5, None), expected)


@pytest.mark.parametrize(
    ("load", "rank"),
    slow_but([("spread", 5)], [("spread", 5), ("one token", 0), *((load, 8) for load in LOADS if load not in _FEW)]),
)
@pytest.mark.parametrize(
    ("way", "form"),
    slow_but(
        [("triton", "gated, top 3"), ("triton", _WITH_BIASES), ("grouped", "plain, out x in, no biases, top 2")],
        itertools.product(WAYS, [name for name in FORMS if name != "lola"]),
    ),
)
def test_every_form_equals_the_loop_in_4_bit(way: str, form: str, load: str, rank: int) -> None:
    given, products = FORMS[form], WAYS[way]
    experts = make_experts("nf4", form=given)
    expected = outcome(run_experts, experts, LOADS[load], rank, None, given.top_k)
    same(outcome(partial(run_experts, products=products), experts, LOADS[load], rank, None, given.top_k), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 8, 17])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_rank_equals_the_loop(way: Products, rank: int) -> None:
    experts = make_experts("nf4")
    expected = outcome(run_experts, experts, LOADS["spread"], rank, None)
    same(outcome(partial(run_experts, products=way), experts, LOADS["spread"], rank, None), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("form", ["lola", "gated, top 3"])
def test_lora_on_some_experts_equals_the_loop(way: Products, form: str) -> None:
    given = FORMS[form]
    experts, load = make_experts("nf4", form=given), LOADS["spread"]
    expected = outcome(run_experts, experts, load, 4, (1, 3), given.top_k)
    same(outcome(partial(run_experts, products=way), experts, load, 4, (1, 3), given.top_k), expected)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_dense_weights_and_biases_are_trained_too(form: str, load: list[int]) -> None:
    given = FORMS[form]
    experts = make_experts("dense", (24, 40, 4), given)
    expected = outcome(run_experts, experts, load, 3, None, given.top_k)
    same(outcome(partial(run_experts, products=GroupedMatmuls()), experts, load, 3, None, given.top_k), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lola", _WITH_BIASES])
def test_trained_biases_on_4_bit_weights_equal_the_loop(form: str) -> None:
    given = FORMS[form]
    experts, load = make_experts("nf4", form=given), LOADS["spread"]
    for name in experts.shapes:
        getattr(experts, f"{name}_bias").requires_grad_()
    expected = outcome(run_experts, experts, load, 4, None, given.top_k)
    same(outcome(partial(run_experts, products=WAYS["triton"]), experts, load, 4, None, given.top_k), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        *(((128, 64, 3), form) for form in FORMS),
        ((192, 320, 5), "lola"),
        ((64, 1088, 2), "lola"),
        ((64, 320, 2), "gated"),
        ((64, 320, 2), _WITH_BIASES),
    ],
    ids=str,
)
def test_other_sizes_equal_the_loop(sizes: tuple[int, int, int], form: str) -> None:
    """The last sizes have full superblocks of scales and a partial one, for gated experts in each part."""
    given = FORMS[form]
    experts, load = make_experts("nf4", sizes, given), [0, 1, 1, 0, 1]
    expected = outcome(run_experts, experts, load, 4, None, given.top_k)
    for way in (GroupedMatmuls(), WIDE):
        same(outcome(partial(run_experts, products=way), experts, load, 4, None, given.top_k), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "form"),
    itertools.product(("triton", "grouped"), ("lola", "gated, top 3", "plain, out x in, no biases, top 2")),
)
def test_dropout_equals_the_plain_formula(way: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients are those of `x @ W + (x * mask) @ A.T @ B.T` with the drawn masks."""
    given, ids, rank, p = FORMS[form], LOADS["spread"], 4, 0.4
    experts = make_experts("nf4", form=given)
    masks: list[Tensor] = []
    real = kernel._keep
    monkeypatch.setattr(kernel, "_keep", lambda *given: masks.append(real(*given)) or masks[-1])
    got = outcome(partial(run_experts, products=WAYS[way]), experts, ids, rank, None, given.top_k, p)
    assert len(masks) == 2
    assert 0.5 < masks[1].float().mean() < 0.7
    same(got, outcome(partial(plain_with_masks, masks=masks), experts, ids, rank, None, given.top_k, p))


def plain_with_masks(
    experts: FusedExperts, x: Tensor, ids: Tensor, probs: Tensor, paths: dict[str, LowRank], masks: list[Tensor]
) -> Tensor:
    groups = group_on_device(ids.flatten(), 4, fitting_tile_rows(ids.numel(), 4))
    act_fn, top_k = ACT2FN[experts.activation], ids.shape[1]

    def project(name: str, e: int, x: Tensor, kept: Tensor) -> Tensor:
        parts = [part for part, (projection, _) in experts.parts.items() if projection == name]
        weights = [experts.expert_weight(part, e, torch.float32) for part in parts]
        bias, path = getattr(experts, f"{name}_bias"), paths[name]
        out = torch.cat([x @ (weight if experts.is_transposed else weight.t()) for weight in weights])
        side = path.b_EOR[e] @ (path.a_ERI[e] @ (x * kept / (1 - path.dropout)))
        return out + side + (0 if bias is None else bias[e])

    (up, down), rows = experts.shapes, []
    for choice, e in enumerate(ids.flatten().tolist()):
        keep_up, keep_down = (mask[groups.row_of_choice_C[choice]] for mask in masks)
        t, k = divmod(choice, top_k)
        pre = project(up, e, x[t], keep_up)
        if experts.has_gate:
            gate, pre = pre.chunk(2)
            act = act_fn(gate) * pre
        else:
            act = act_fn(pre)
        rows.append(project(down, e, act, keep_down) * probs[t, k])
    return torch.stack(rows).view(len(ids), top_k, -1).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [0, 1], ids=["in", "out"])
@pytest.mark.parametrize("form", ["lola", "gated", _WITH_BIASES])
def test_weights_decoded_inside_are_those_dequantised_whole(form: str, projection: int) -> None:
    """The identity matrix times the weight (or its transpose) gives the weight itself, bit for bit."""
    experts = make_experts("nf4", (64, 192, 2), FORMS[form])
    weight = replace(experts.weights(list(experts.shapes)[projection]), bias=None)
    dense = weight.dense(torch.float32)
    whole = dense if experts.is_transposed else dense.transpose(1, 2)
    for times, wanted in ((WAYS["triton"].times, whole), (WAYS["triton"].times_transposed, whole.transpose(1, 2))):
        rows = wanted.shape[1]
        groups = group_on_device(torch.arange(2).repeat_interleave(rows), 2, 64)
        eye = torch.zeros(groups.num_rows, rows).index_copy_(0, groups.row_of_choice_C, torch.eye(rows).repeat(2, 1))
        assert torch.equal(times(eye, weight, groups, None)[groups.row_of_choice_C], wanted.flatten(0, 1))
    for part, (name, number) in experts.parts.items():
        if name == list(experts.shapes)[projection]:
            rows, columns = experts.part_shape(part)
            for e in range(2):
                own = dense[e][:, number * columns :] if experts.is_transposed else dense[e][number * rows :]
                assert torch.equal(own[:rows, :columns], experts.expert_weight(part, e, torch.float32))


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_groups_are_whole_tiles(load: list[int], tile_rows: int) -> None:
    ids = torch.tensor(load)
    groups = group_on_device(ids, 4, tile_rows)
    rows = groups.row_of_choice_C
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
