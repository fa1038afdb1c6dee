"""The experts' forward and backward, compared with a loop over tokens in plain autograd, for every form of experts.

Shape suffixes: T tokens, K choices per token, D hidden, F inner, E experts, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lola_ft.errors import UserError
from lola_ft.kernels import experts as kernel
from lola_ft.kernels import loop_products
from lola_ft.kernels.activations import ACTIVATIONS, activation_of
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.stacks import LowRank
from lola_ft.kernels.tiles import Tiles
from lola_ft.model.experts import FusedExperts
from tests.kernels.conftest import FORMS, LOLA, Form, choices

# Relative to the largest entry, with 8 bits of mantissa in weights, activations and sums. Measured: 0.008.
BF16 = 0.03


@dataclass
class Case:
    """Experts, one batch and, if ranks are given, LoRA factors. All of them want gradients unless frozen."""

    experts: FusedExperts
    x_TD: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dropout: float = 0.0

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x_TD, "probs": self.probs_TK, **dict(self.experts.named_parameters())}
        for name, (a, b) in self.factors.items():
            named |= {f"{name} a": a, f"{name} b": b}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def run(self) -> Tensor:
        low_rank = {name: LowRank(a, b, self.dropout) for name, (a, b) in self.factors.items()}
        return run_experts(self.experts, self.x_TD, self.ids_TK, self.probs_TK, low_rank)

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
    sizes: tuple[int, int, int] | None = None,
    frozen: bool = False,
    dropout: float = 0.0,
    form: Form = LOLA,
) -> Case:
    """Make a random case. In `ranks`, the projection into the experts is `up_proj`, also for gated experts."""
    generator = torch.Generator().manual_seed(len(expert_ids))
    # More choices reach more experts. There should still be experts without tokens.
    hidden, inner, num_experts = sizes or (24, 40, 4 if form.top_k == 1 else 6)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).requires_grad_()

    experts = FusedExperts(hidden, inner, num_experts, **form.settings)
    for parameter in experts.parameters():
        parameter.data = random(*parameter.shape, scale=0.3).detach()
    experts.requires_grad_(not frozen)
    x = random(len(expert_ids), hidden)
    probs = random(len(expert_ids), form.top_k).sigmoid().detach().requires_grad_()
    factors = {}
    for name, rank in (ranks or {}).items():
        name = name if name in experts.shapes else "gate_up_proj"
        in_features, out_features = experts.shapes[name]
        # A permuted view, as from PEFT's layout of B.
        b = random(out_features, rank, num_experts, scale=0.3).detach().permute(2, 0, 1).requires_grad_()
        factors[name] = (random(num_experts, rank, in_features, scale=0.3), b)
    return Case(experts, x, choices(expert_ids, form.top_k, num_experts), probs, factors, dropout)


def plain_loop(case: Case) -> Tensor:
    """Compute the output one token and one choice after another."""
    experts, rows = case.experts, []
    act_fn = ACT2FN[experts.activation]

    def project(name: str, e: int, x: Tensor) -> Tensor:
        stack, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
        out = x @ (stack[e] if experts.is_transposed else stack[e].t())
        out = out if bias is None else out + bias[e]
        if name in case.factors:
            a, b = case.factors[name]
            out = out + b[e] @ (a[e] @ x)
        return out

    up, down = experts.shapes
    for x, ids, probs in zip(case.x_TD, case.ids_TK.tolist(), case.probs_TK, strict=True):
        total = torch.zeros_like(x)
        for e, prob in zip(ids, probs, strict=True):
            pre = project(up, e, x)
            if experts.has_gate:
                gate, pre = pre.chunk(2)
                act = act_fn(gate) * pre
            else:
                act = act_fn(pre)
            total = total + project(down, e, act) * prob
        rows.append(total)
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


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_output_and_every_gradient_equal_the_loop(load: str, ranks: dict[str, int]) -> None:
    equals_the_loop(make_case(LOADS[load], ranks))


@pytest.mark.parametrize("load", LOADS)
def test_every_form_equals_the_loop(load: str, form: Form) -> None:
    equals_the_loop(make_case(LOADS[load], {"up_proj": 3, "down_proj": 5}, form=form))


def equals_the_loop(case: Case) -> None:
    expected, actual = plain_loop(case), case.run()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    wanted, got = case.gradients(expected), case.gradients(actual)
    assert set(got) == set(wanted) >= {"x", "probs", *case.experts.shapes}
    assert len(got) == 4 + 2 * case.experts.has_bias + 2 * len(case.factors)
    for name, grad in wanted.items():
        # Sums over up to 70 rows have another order.
        torch.testing.assert_close(got[name], grad, atol=1e-4, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers_with_exact_gradients(name: str) -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64).requires_grad_()
    expected = ACT2FN[name](x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    activation = activation_of(name)
    torch.testing.assert_close(activation.forward(x.detach()), expected.detach(), atol=1e-12, rtol=1e-12)
    got = activation.backward(torch.ones_like(x), x.detach())
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-12)  # theirs has ten digits of sqrt(2/pi) in one


def test_an_unknown_activation_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"'mish'.*gelu_new.*silu"):
        FusedExperts(8, 8, 2, activation="mish")


def test_a_token_may_choose_an_expert_twice() -> None:
    case = make_case(SPREAD, {"up_proj": 3}, form=FORMS["gated, top 3"])
    case.ids_TK[::2, 2] = case.ids_TK[::2, 0]
    equals_the_loop(case)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 2), (17, 31, 7), (8, 64, 16)])
def test_odd_sizes_equal_the_loop(sizes: tuple[int, int, int], form: Form) -> None:
    case = make_case([i * 5 % sizes[2] for i in range(13)], {"up_proj": 5, "down_proj": 3}, sizes, form=form)
    expected, actual = plain_loop(case), case.run()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    wanted, got = case.gradients(expected), case.gradients(actual)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ranks", RANKS[:2], ids=str)
def test_gradients_equal_finite_differences_in_double_precision(ranks: dict[str, int], form: Form) -> None:
    case = make_case(SPREAD, ranks, sizes=(4, 6, 4), form=form)
    case.experts.double()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (case.x_TD, case.probs_TK)]
    factors = {name: (a.detach().double(), b.detach().double()) for name, (a, b) in case.factors.items()}
    flat = [factor.requires_grad_() for pair in factors.values() for factor in pair]

    def run(x: Tensor, probs: Tensor, *pairs: Tensor) -> Tensor:
        low_rank = {name: LowRank(pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(factors)}
        return run_experts(case.experts, x, case.ids_TK, probs, low_rank)

    assert torch.autograd.gradcheck(run, (*leaves, *flat), fast_mode=True)


def bf16_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().float() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("ranks", [{}, {"up_proj": 4, "down_proj": 2}], ids=str)
def test_autocast_multiplies_in_bfloat16_and_keeps_leaves_in_float32(ranks: dict[str, int], form: Form) -> None:
    """Leaves and their gradients stay float32. Only factors of products are bfloat16."""
    case = make_case(LOADS["more than a bucket"] + SPREAD, ranks, form=form)
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


def test_a_bfloat16_model_is_as_exact_as_bfloat16_allows(form: Form) -> None:
    case = make_case(SPREAD, {"up_proj": 4, "down_proj": 2}, form=form)
    expected = plain_loop(case)
    wanted = case.gradients(expected)
    case.experts.to(torch.bfloat16)
    case.x_TD = case.x_TD.detach().to(torch.bfloat16).requires_grad_()
    actual = case.run()  # adapters and probabilities stay float32, as in PEFT and the router
    assert actual.dtype == torch.bfloat16
    assert bf16_error(actual, expected) < BF16
    for name, grad in case.gradients(actual).items():
        assert grad.dtype == case.leaves[name].dtype
        assert bf16_error(grad, wanted[name]) < BF16, name


def test_no_tokens_give_an_empty_output_and_zero_gradients(form: Form) -> None:
    case = make_case([], {"up_proj": 2, "down_proj": 2}, form=form)
    out = case.run()
    assert out.shape == (0, 24)
    assert all((grad == 0).all() for grad in case.gradients(out).values())


def test_an_expert_without_tokens_gets_a_zero_gradient(form: Form) -> None:
    case = make_case([2, 0, 2], {"up_proj": 2, "down_proj": 2}, form=form)
    used = sorted(set(case.ids_TK.flatten().tolist()))
    idle = [e for e in range(case.experts.num_experts) if e not in used]
    assert used, idle
    grads = case.gradients(case.run())
    for name in grads.keys() - {"x", "probs"}:
        assert (grads[name][idle] == 0).all(), name
        assert (grads[name][used] != 0).any(), name


def test_only_what_wants_a_gradient_gets_one(form: Form) -> None:
    case = make_case(SPREAD, {"up_proj": 2, "down_proj": 2}, frozen=True, form=form)
    case.x_TD.requires_grad_(False)
    out = case.run()
    out.sum().backward()
    assert case.x_TD.grad is None
    assert all(parameter.grad is None for parameter in case.experts.parameters())
    assert all(factor.grad is not None for pair in case.factors.values() for factor in pair)
    assert case.probs_TK.grad is not None


def test_one_trained_stack_among_frozen_ones_gets_its_gradient(form: Form) -> None:
    expected = make_case(SPREAD, form=form)
    wanted = expected.gradients(expected.run())
    for trained, _ in expected.experts.named_parameters():
        case = make_case(SPREAD, frozen=True, form=form)
        case.experts.get_parameter(trained).requires_grad_()
        got = case.gradients(case.run())
        assert set(got) == {"x", "probs", trained}
        assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_lora_on_only_the_second_projection_gets_its_gradient(form: Form) -> None:
    case = make_case(SPREAD, {"down_proj": 3}, frozen=True, form=form)
    wanted, got = case.gradients(plain_loop(case)), case.gradients(case.run())
    for name in ("x", "down_proj a", "down_proj b"):
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_a_gradient_with_stride_0_equals_the_loop(form: Form) -> None:
    case = make_case(SPREAD, {"up_proj": 2}, form=form)
    case.run().sum().backward()
    got = {name: leaf.grad.clone() for name, leaf in case.leaves.items()}
    for leaf in case.leaves.values():
        leaf.grad = None
    plain_loop(case).sum().backward()
    for name, leaf in case.leaves.items():
        torch.testing.assert_close(got[name], leaf.grad, atol=1e-4, rtol=1e-5)


def test_two_runs_are_bit_equal(form: Form) -> None:
    case = make_case(LOADS["more than a bucket"], {"up_proj": 3, "down_proj": 3}, form=form)
    first, second = (case.gradients(case.run()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("load", ["spread", "more than a bucket"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padded_rows_never_count(poison: float, load: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old content of memory (`new_empty` is filled with NaN here) reaches neither output nor gradient."""
    case = make_case(LOADS[load], {"up_proj": 3, "down_proj": 2}, form=form)
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


def test_other_tokens_do_not_change_a_tokens_output(form: Form) -> None:
    """The outputs differ only by rounding, because the group size differs."""
    case = make_case(SPREAD, {"up_proj": 3}, form=form)
    whole = case.run()
    for t in (0, 5, 10):
        one = slice(t, t + 1)
        alone = Case(case.experts, case.x_TD[one], case.ids_TK[one], case.probs_TK[one], case.factors)
        torch.testing.assert_close(alone.run()[0], whole[t], atol=1e-6, rtol=1e-5)


class Saved:
    """Every tensor that autograd saves, and the tensors in the contexts of custom functions."""

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
    """Return the tensors in attributes of the graph's nodes, at any depth, and in closures of functions among them."""
    found: list[Tensor] = []
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        found += [tensor for value in getattr(node, "__dict__", {}).values() for tensor in tensors_in(value)]
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, one.name) for one in fields(value)]
    else:
        inner = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        inner += getattr(value, "__defaults__", None) or ()
    for one in [] if isinstance(value, Tensor) else inner:
        yield from tensors_in(one)


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_a_weights_size_is_kept_for_backward(autocast: bool, form: Form) -> None:
    """Autograd saves only tensors that grow with tokens or rank, and references to the stacks themselves."""
    ranks = {"up_proj": 2, "down_proj": 2}
    case = make_case(SPREAD, ranks, sizes=(96, 160, 4), frozen=True, dropout=0.1, form=form)
    with Saved() as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = case.run()
    assert saved.tensors, "nothing was looked at"
    held = context_tensors(out)
    stacks = {stack.data_ptr() for stack in case.experts.parameters()}
    assert {tensor.data_ptr() for tensor in held} >= stacks, "no context was looked at"
    for tensor in saved.tensors + held:
        assert tensor.ndim < 3 or tensor.shape[0] == 4, "a stack per expert"
        assert tensor.data_ptr() in stacks or tensor.numel() < 96 * 160
        assert not {96, 160} <= set(tensor.shape) or tensor.data_ptr() in stacks


@pytest.mark.parametrize("recomputes", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["lola", "lola, top 2", "gated", "gated, top 3"])
def test_exactly_what_backward_needs_is_saved(name: str, recomputes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes for N rows and C choices of T tokens. Activations of gated experts are recomputed; on a GPU, all are."""
    monkeypatch.setattr(loop_products.LoopProducts, "recomputes_activations", recomputes)
    form = FORMS[name]
    case = make_case([0] * 9, {"up_proj": 3, "down_proj": 2}, form=form, dropout=0.5, frozen=True)
    with Saved() as saved:
        case.run()
    top_k, gated = form.top_k, "has_gate" in form.settings
    rows, pre, experts = 16 * top_k, 80 if gated else 40, case.experts.num_experts
    expected = [
        (rows, 24) if top_k == 1 else (9, 24),  # inputs
        (rows, pre),
        *([] if gated or recomputes else [(rows, 40)]),  # activations
        (9, top_k),
        *[(experts, 8, 24), (experts, pre, 8), (experts, 8, 40), (experts, 24, 8)],  # A and B, padded to rank 8
        *[(rows, 8), (rows, 8), (rows, 24), (rows, 40)],  # rank-R intermediates and dropout's masks
    ]
    of_experts = [tuple(tensor.shape) for tensor in saved.tensors if tensor.grad_fn is None or tensor.ndim > 1]
    assert of_experts[-len(expected) :] == expected


def test_weights_are_read_once_per_pass_for_active_experts(form: Form) -> None:
    case = make_case([2, 0, 2, 2], {"up_proj": 2}, form=form)
    active = case.ids_TK.unique().tolist()
    assert len(active) < case.experts.num_experts
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
    assert asked == [(name, e) for name in case.experts.shapes for e in active]
    asked.clear()
    out.sum().backward()
    assert sorted(asked) == sorted((name, e) for e in active for name in case.experts.shapes)


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


def test_dropout_drops_the_given_share() -> None:
    case = make_case([0] * 256, {"up_proj": 2, "down_proj": 2}, sizes=(64, 128, 1), dropout=0.25)
    _, masks = with_masks(case)
    assert [tuple(mask.shape) for mask in masks] == [(256, 64), (256, 128)]
    for mask in masks:
        # 16 384 entries or more: one standard deviation of the share is 0.0034.
        assert abs((~mask).float().mean() - 0.25) < 0.015


def test_dropout_touches_the_side_path_only(form: Form) -> None:
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 3}, dropout=0.9, form=form)
    for _, b in case.factors.values():
        b.data.zero_()
    without = make_case(SPREAD, form=form)
    assert torch.equal(case.run(), without.run())


def test_without_dropout_no_mask_is_drawn() -> None:
    _, masks = with_masks(make_case(SPREAD, {"up_proj": 3}))
    assert masks == []


def finite_difference(run: Callable[[], Tensor], leaf: Tensor, index: tuple[int, ...]) -> float:
    """Return d sum(run()) / d leaf[index], by central difference."""
    values = []
    for step in (1e-6, -1e-6):
        before = leaf.data[index].clone()
        leaf.data[index] += step
        values.append(float(run().sum()))
        leaf.data[index] = before
    return (values[0] - values[1]) / 2e-6


def test_backward_uses_the_masks_of_forward(form: Form) -> None:
    """With a fixed seed, the gradient is the slope of the output with that seed."""
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 2}, sizes=(6, 10, 4), dropout=0.5, form=form)
    case.experts.double()
    case.x_TD, case.probs_TK = (t.detach().double().requires_grad_() for t in (case.x_TD, case.probs_TK))
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


def test_two_forwards_before_backward_keep_their_own_masks(form: Form) -> None:
    case = make_case(SPREAD, {"up_proj": 3, "down_proj": 2}, dropout=0.5, form=form)
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
