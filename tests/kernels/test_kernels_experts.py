"""The experts' forward and backward against a loop over tokens in plain autograd.

Shapes: T tokens, D hidden, F inner, E experts, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels import experts as kernel
from lola_ft.kernels import loop_products
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.stacks import LowRank
from lola_ft.kernels.tiles import Tiles
from lola_ft.model.experts import LolaExperts

# 8 bits of mantissa in weights, activations and sums, relative to the largest entry; seen: 0.008.
BF16 = 0.03


@dataclass
class Case:
    """Experts, one batch and, if ranks are given, LoRA factors; all leaves that want gradients."""

    experts: LolaExperts
    x_TD: Tensor
    ids_T: Tensor
    probs_T: Tensor
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dropout: float = 0.0

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x_TD, "probs": self.probs_T, **dict(self.experts.named_parameters())}
        for name, (a, b) in self.factors.items():
            named |= {f"{name} a": a, f"{name} b": b}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def run(self) -> Tensor:
        low_rank = {name: LowRank(a, b, self.dropout) for name, (a, b) in self.factors.items()}
        return run_experts(self.experts, self.x_TD, self.ids_T, self.probs_T, low_rank)

    def gradients(self, out_TD: Tensor, seed: int = 5) -> dict[str, Tensor]:
        weights = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(seed))
        leaves = self.leaves
        grads = torch.autograd.grad(out_TD, list(leaves.values()), weights.to(out_TD.dtype), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def make_case(
    expert_ids: list[int],
    ranks: dict[str, int] | None = None,
    sizes: tuple[int, int, int] = (24, 40, 4),
    frozen: bool = False,
    dropout: float = 0.0,
) -> Case:
    generator = torch.Generator().manual_seed(len(expert_ids))
    hidden, inner, num_experts = sizes

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).requires_grad_()

    experts = LolaExperts(hidden, inner, num_experts)
    for parameter in experts.parameters():
        parameter.data = random(*parameter.shape, scale=0.3).detach()
    experts.requires_grad_(not frozen)
    x, probs = random(len(expert_ids), hidden), random(len(expert_ids)).sigmoid().detach().requires_grad_()
    factors = {}
    for name, rank in (ranks or {}).items():
        in_features, out_features = experts.shapes[name]
        # A permuted view, as PEFT's layout of B gives it.
        b = random(out_features, rank, num_experts, scale=0.3).detach().permute(2, 0, 1).requires_grad_()
        factors[name] = (random(num_experts, rank, in_features, scale=0.3), b)
    return Case(experts, x, torch.tensor(expert_ids, dtype=torch.long), probs, factors, dropout)


def plain_loop(case: Case) -> Tensor:
    """One token after the other."""
    experts, rows = case.experts, []
    for x, e, prob in zip(case.x_TD, case.ids_T.tolist(), case.probs_T, strict=True):
        pre = x @ experts.up_proj[e] + experts.up_proj_bias[e]
        if "up_proj" in case.factors:
            a, b = case.factors["up_proj"]
            pre = pre + b[e] @ (a[e] @ x)
        act = F.gelu(pre, approximate="tanh")
        y = act @ experts.down_proj[e] + experts.down_proj_bias[e]
        if "down_proj" in case.factors:
            a, b = case.factors["down_proj"]
            y = y + b[e] @ (a[e] @ act)
        rows.append(y * prob)
    return torch.stack(rows)


SPREAD = [3, 0, 1, 1, 3, 2, 0, 0, 3, 1, 2]
LOADS = {
    "spread": SPREAD,
    "empty experts": [2, 0, 2, 2],
    "one token": [1],
    "all tokens to one expert": [3] * 37,
    "more than a bucket": [0] * 33 + [2] * 70,
}
RANKS: list[dict[str, int]] = [
    {},
    {"up_proj": 1, "down_proj": 5},
    {"up_proj": 3},
    {"down_proj": 8},
]


@pytest.mark.parametrize("joint", [False, True], ids=["a call for each", "joint"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_output_and_every_gradient_equal_the_loop(
    load: str, ranks: dict[str, int], joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_products, "_is_joint", lambda *_: joint)
    case = make_case(LOADS[load], ranks)
    expected, actual = plain_loop(case), case.run()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    wanted, got = case.gradients(expected), case.gradients(actual)
    assert set(got) == set(wanted) >= {"x", "probs", "up_proj", "down_proj_bias"}
    assert len(got) == 6 + 2 * len(ranks)
    for name, grad in wanted.items():
        # Sums over up to 70 rows in another order.
        torch.testing.assert_close(got[name], grad, atol=1e-4, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 2), (17, 31, 7), (8, 64, 16)])
def test_odd_sizes(sizes: tuple[int, int, int]) -> None:
    case = make_case([i * 5 % sizes[2] for i in range(13)], {"up_proj": 5, "down_proj": 3}, sizes)
    expected, actual = plain_loop(case), case.run()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    wanted, got = case.gradients(expected), case.gradients(actual)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ranks", RANKS[:2], ids=str)
def test_double_precision_gradients_by_finite_differences(ranks: dict[str, int]) -> None:
    case = make_case(SPREAD, ranks, sizes=(4, 6, 4))
    case.experts.double()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (case.x_TD, case.probs_T)]
    factors = {name: (a.detach().double(), b.detach().double()) for name, (a, b) in case.factors.items()}
    flat = [factor.requires_grad_() for pair in factors.values() for factor in pair]

    def run(x: Tensor, probs: Tensor, *pairs: Tensor) -> Tensor:
        low_rank = {name: LowRank(pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(factors)}
        return run_experts(case.experts, x, case.ids_T, probs, low_rank)

    assert torch.autograd.gradcheck(run, (*leaves, *flat), fast_mode=True)


def bf16_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().float() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("ranks", [{}, {"up_proj": 4, "down_proj": 2}], ids=str)
def test_bfloat16_autocast(ranks: dict[str, int]) -> None:
    """Leaves stay float32 and so do their gradients; only what is multiplied is bfloat16."""
    case = make_case(LOADS["more than a bucket"] + SPREAD, ranks)
    expected = plain_loop(case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.run()
    assert actual.dtype == torch.float32
    assert bf16_error(actual, expected) < BF16
    assert not torch.equal(actual, case.run()), "autocast was not heeded"
    wanted, got = case.gradients(expected), case.gradients(actual)
    for name, grad in wanted.items():
        assert got[name].dtype == torch.float32
        assert bf16_error(got[name], grad) < BF16, name


def test_a_bfloat16_model_without_autocast() -> None:
    case = make_case(SPREAD, {"up_proj": 4, "down_proj": 2})
    expected = plain_loop(case)
    wanted = case.gradients(expected)
    case.experts.to(torch.bfloat16)
    case.x_TD = case.x_TD.detach().to(torch.bfloat16).requires_grad_()
    actual = case.run()  # adapters and probabilities stay float32, as PEFT and the router have them
    assert actual.dtype == torch.bfloat16
    assert bf16_error(actual, expected) < BF16
    for name, grad in case.gradients(actual).items():
        assert grad.dtype == case.leaves[name].dtype
        assert bf16_error(grad, wanted[name]) < BF16, name


def test_no_token_at_all() -> None:
    case = make_case([], {"up_proj": 2, "down_proj": 2})
    out = case.run()
    assert out.shape == (0, 24)
    assert all((grad == 0).all() for grad in case.gradients(out).values())


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    case = make_case([2, 0, 2], {"up_proj": 2, "down_proj": 2})
    grads = case.gradients(case.run())
    for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias", "up_proj a", "up_proj b", "down_proj a"):
        assert (grads[name][[1, 3]] == 0).all(), name
        assert (grads[name][[0, 2]] != 0).any(), name


def test_only_what_wants_a_gradient_gets_one() -> None:
    case = make_case(SPREAD, {"up_proj": 2, "down_proj": 2}, frozen=True)
    case.x_TD.requires_grad_(False)
    out = case.run()
    out.sum().backward()
    assert case.x_TD.grad is None
    assert all(parameter.grad is None for parameter in case.experts.parameters())
    assert all(factor.grad is not None for pair in case.factors.values() for factor in pair)
    assert case.probs_T.grad is not None


@pytest.mark.parametrize("trained", ["up_proj", "up_proj_bias", "down_proj", "down_proj_bias"])
def test_one_trained_stack_among_frozen_ones(trained: str) -> None:
    expected = make_case(SPREAD)
    case = make_case(SPREAD, frozen=True)
    getattr(case.experts, trained).requires_grad_()
    wanted, got = expected.gradients(expected.run()), case.gradients(case.run())
    assert set(got) == {"x", "probs", trained}
    assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_the_adapter_of_a_later_projection_alone_is_trained_through_the_other() -> None:
    case = make_case(SPREAD, {"down_proj": 3}, frozen=True)
    wanted, got = case.gradients(plain_loop(case)), case.gradients(case.run())
    for name in ("x", "down_proj a", "down_proj b"):
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_a_stride_0_gradient() -> None:
    case = make_case(SPREAD, {"up_proj": 2})
    case.run().sum().backward()
    got = {name: leaf.grad.clone() for name, leaf in case.leaves.items()}
    for leaf in case.leaves.values():
        leaf.grad = None
    plain_loop(case).sum().backward()
    for name, leaf in case.leaves.items():
        torch.testing.assert_close(got[name], leaf.grad, atol=1e-4, rtol=1e-5)


def test_two_runs_are_bit_equal() -> None:
    case = make_case(LOADS["more than a bucket"], {"up_proj": 3, "down_proj": 3})
    first, second = (case.gradients(case.run()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("joint", [False, True], ids=["a call for each", "joint"])
@pytest.mark.parametrize("load", ["spread", "more than a bucket"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padded_rows_never_count(poison: float, load: str, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory held before (`new_empty` is filled with NaN here) reaches neither output nor gradient."""
    monkeypatch.setattr(loop_products, "_is_joint", lambda *_: joint)
    case = make_case(LOADS[load], {"up_proj": 3, "down_proj": 2})
    expected = case.run()
    wanted = case.gradients(expected)
    real_empty_like, real_new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: filled(real_empty_like(*args, **kw), poison))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kw: filled(real_new_empty(*args, **kw), poison))
    actual = case.run()
    got = case.gradients(actual)
    monkeypatch.undo()
    assert torch.equal(actual, expected)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def filled(tensor: Tensor, value: float) -> Tensor:
    return tensor.fill_(value) if tensor.is_floating_point() else tensor


def test_other_tokens_do_not_change_a_tokens_output() -> None:
    """Beyond the rounding of another group size."""
    case = make_case(SPREAD, {"up_proj": 3})
    whole = case.run()
    for t in (0, 5, 10):
        alone = Case(case.experts, case.x_TD[t : t + 1], case.ids_T[t : t + 1], case.probs_T[t : t + 1], case.factors)
        torch.testing.assert_close(alone.run()[0], whole[t], atol=1e-6, rtol=1e-5)


class Saved:
    """Every tensor that autograd keeps, and what a custom function's context holds besides."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> "Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor


def context_tensors(out: Tensor) -> list[Tensor]:
    """What every node of the graph holds as plain attributes, and what functions among those hold in turn."""
    found: list[Tensor] = []
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        for value in vars(node).values() if hasattr(node, "__dict__") else []:
            for item in value if isinstance(value, (tuple, list)) else [value]:
                cells = [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
                values = [item, *cells, *(getattr(item, "__defaults__", None) or ())]
                found += [v for v in values if isinstance(v, Tensor)]
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_a_weights_size_is_kept_for_backward(autocast: bool) -> None:
    """Only tensors that grow with tokens or rank; and the stacks themselves, by reference."""
    case = make_case(SPREAD, {"up_proj": 2, "down_proj": 2}, sizes=(96, 160, 4), frozen=True, dropout=0.1)
    with Saved() as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = case.run()
    assert saved.tensors, "nothing was looked at"
    held = context_tensors(out)
    assert held, "no context was looked at"
    stacks = {stack.data_ptr() for stack in case.experts.parameters()}
    rows = 32 * len(set(SPREAD))
    for tensor in saved.tensors + held:
        assert tensor.data_ptr() in stacks or tensor.shape[0] in (rows, len(SPREAD)) or tensor.numel() < 96 * 160
        assert not {96, 160} <= set(tensor.shape) or tensor.data_ptr() in stacks
    total = sum(tensor.numel() for tensor in saved.tensors)
    assert total < rows * (3 * 96 + 2 * 160 + 8) + 4 * 2 * 2 * (96 + 160) + 10 * 96 * len(SPREAD)


def test_weights_are_asked_for_by_active_expert_once_a_pass() -> None:
    case = make_case([2, 0, 2, 2], {"up_proj": 2})
    asked: list[tuple[str, int]] = []
    real = case.experts.weights

    def weights(name: str) -> Any:
        stack = real(name)

        def tiles(expert_ids: list[int], dtype: torch.dtype) -> Iterator[Tiles]:
            asked.extend((name, expert_id) for expert_id in expert_ids)
            return stack.tiles(expert_ids, dtype)

        return replace(stack, tiles=tiles)

    case.experts.weights = weights  # type: ignore[method-assign]
    out = case.run()
    assert asked == [(name, e) for name in ("up_proj", "down_proj") for e in (0, 2)]
    asked.clear()
    out.sum().backward()
    assert sorted(asked) == sorted((name, e) for e in (0, 2) for name in ("up_proj", "down_proj"))


def with_masks(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Run once and return the dropout masks used."""
    masks: list[Tensor] = []
    real = kernel._keep

    def spy(like: Tensor, probability: float) -> Tensor | None:
        mask = real(like, probability)
        if mask is not None:
            masks.append(mask)
        return mask

    kernel._keep = spy
    try:
        return case.run(), masks
    finally:
        kernel._keep = real


def test_dropout_masks_by_share() -> None:
    case = make_case([0] * 256, {"up_proj": 2, "down_proj": 2}, sizes=(64, 128, 1), dropout=0.25)
    _, masks = with_masks(case)
    assert [tuple(mask.shape) for mask in masks] == [(256, 64), (256, 128)]
    for mask in masks:
        # 16 384 entries or more: one standard deviation of the share is 0.0034.
        assert abs((~mask).float().mean() - 0.25) < 0.015


def test_dropout_touches_the_side_path_only() -> None:
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 3}, dropout=0.9)
    for _, b in case.factors.values():
        b.data.zero_()
    without = make_case(SPREAD)
    assert torch.equal(case.run(), without.run())


def test_without_dropout_no_mask_is_formed() -> None:
    _, masks = with_masks(make_case(SPREAD, {"up_proj": 3}))
    assert masks == []


def finite_difference(run: Callable[[], Tensor], leaf: Tensor, index: tuple[int, ...]) -> float:
    """d sum(run()) / d leaf[index], by central difference."""
    values = []
    for step in (1e-6, -1e-6):
        before = leaf.data[index].clone()
        leaf.data[index] += step
        values.append(float(run().sum()))
        leaf.data[index] = before
    return (values[0] - values[1]) / 2e-6


def test_backward_uses_the_masks_of_forward() -> None:
    """The gradient under a fixed seed is the slope of the output under that seed."""
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 2}, sizes=(6, 10, 4), dropout=0.5)
    case.experts.double()
    case.x_TD, case.probs_T = (t.detach().double().requires_grad_() for t in (case.x_TD, case.probs_T))
    case.factors = {
        name: (a.detach().double().requires_grad_(), b.detach().double().requires_grad_())
        for name, (a, b) in case.factors.items()
    }

    def run() -> Tensor:
        torch.manual_seed(3)
        return case.run()

    leaves = case.leaves
    grads = dict(zip(leaves, torch.autograd.grad(run().sum(), list(leaves.values())), strict=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in leaves.items():
            for _ in range(6):
                index = tuple(int(torch.randint(size, (), generator=generator)) for size in leaf.shape)
                assert grads[name][index].item() == pytest.approx(finite_difference(run, leaf, index), abs=1e-6), name


def test_two_forwards_before_backward_keep_their_own_masks() -> None:
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 2}, dropout=0.5)
    single = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        single.append(case.gradients(case.run()))
    torch.manual_seed(1)
    first = case.run()
    torch.manual_seed(2)
    second = case.run()
    for out, expected in ((second, single[1]), (first, single[0])):
        got = case.gradients(out)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("rows", "rank", "dtype", "joint"),
    [
        (2048, 8, "bfloat16", True),
        (2048, 64, "bfloat16", False),
        (2048, 8, "float32", False),
        (1, 64, "bfloat16", True),
    ],
)
def test_one_product_for_all_experts_only_where_that_is_quicker(rows: int, rank: int, dtype: str, joint: bool) -> None:
    assert loop_products._is_joint(torch.empty(rows, 2048, dtype=getattr(torch, dtype)), rank) is joint
