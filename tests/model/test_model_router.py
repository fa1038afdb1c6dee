"""The router: top-1 by softmax, not renormalised, in float32; its losses compared with plain loops."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lola_ft.model import LolaForCausalLM
from lola_ft.model.router import RouterGate, load_balancing_loss, route, router_z_loss


def test_the_best_expert_and_its_own_probability() -> None:
    logits = torch.randn(50, 4)
    routing = route(logits)
    assert routing.expert_ids_T.tolist() == [max(range(4), key=row.__getitem__) for row in logits.tolist()]
    exp = logits.exp()
    torch.testing.assert_close(routing.probs_T, exp.amax(-1) / exp.sum(-1))
    assert routing.probs_T.max() < 1, "a renormalised top-1 probability is 1"


def test_the_gradient_of_the_probability_reaches_every_expert() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    route(logits).probs_T.sum().backward()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_float32_whatever_the_precision(dtype: torch.dtype, autocast: bool) -> None:
    gate = RouterGate(64, 16).to(dtype)
    x = torch.randn(30, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        scores = gate(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, F.linear(x.float(), gate.weight.float()))


def test_the_output_is_the_experts_scaled_by_the_probability(make_model: Callable[..., LolaForCausalLM]) -> None:
    moe = make_model().transformer.h[1].moe
    x = torch.randn(2, 11, 64)
    with torch.no_grad():
        actual, logits_TE = moe(x)
        for token, out, logits in zip(x.flatten(0, 1), actual.flatten(0, 1), logits_TE, strict=True):
            e = int(logits.argmax())
            experts = moe.experts
            inner = F.gelu(token @ experts.up_proj[e] + experts.up_proj_bias[e], approximate="tanh")
            expected = (inner @ experts.down_proj[e] + experts.down_proj_bias[e]) * logits.softmax(-1)[e]
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def plain_loss(router_logits: list[torch.Tensor], real: list[bool]) -> float:
    """Return E * sum_e f_e * P_e over real tokens per layer, summed over the layers."""
    total = 0.0
    for logits in router_logits:
        rows = [row.softmax(-1).tolist() for row, keep in zip(logits, real, strict=True) if keep]
        for e in range(logits.shape[-1]):
            share = sum(max(range(len(row)), key=row.__getitem__) == e for row in rows) / len(rows)
            total += logits.shape[-1] * share * sum(row[e] for row in rows) / len(rows)
    return total


@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_equals_a_plain_loop(padded: bool) -> None:
    logits = [torch.randn(40, 8) for _ in range(3)]
    mask = torch.rand(40) > 0.4 if padded else None
    real = mask.tolist() if mask is not None else [True] * 40
    assert load_balancing_loss(logits, mask).item() == pytest.approx(plain_loss(logits, real), rel=1e-5)


def test_balancing_loss_per_layer_is_one_for_an_even_load_and_the_number_of_experts_for_a_collapse() -> None:
    even = 50.0 * torch.eye(8).repeat(5, 1)
    assert load_balancing_loss([even, even]).item() == pytest.approx(2.0)
    collapsed = 50.0 * F.one_hot(torch.zeros(40, dtype=torch.long), 8).float()
    assert load_balancing_loss([collapsed]).item() == pytest.approx(8.0)


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_equals_a_plain_loop(padded: bool) -> None:
    logits = [3 * torch.randn(40, 8, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(40) > 0.4 if padded else None
    real = mask.tolist() if mask is not None else [True] * 40
    expected = 0.0
    for layer in logits:
        squares = [row.exp().sum().log().item() ** 2 for row, keep in zip(layer, real, strict=True) if keep]
        expected += sum(squares) / len(squares)
    assert router_z_loss([layer.float() for layer in logits], mask).item() == pytest.approx(expected, rel=1e-5)


def test_a_base_without_moe_layers_has_no_router_losses(make_model: Callable[..., LolaForCausalLM]) -> None:
    output = make_model(n_layer=1)(torch.tensor([[7, 8, 9]]), output_router_logits=True)
    assert output.router_logits == ()
    assert output.aux_loss == 0 == router_z_loss(output.router_logits)


def test_the_config_may_ask_for_router_logits(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model(output_router_logits=True)
    output = model(torch.tensor([[7, 8, 9]]))
    assert len(output.router_logits) == 2
    assert output.aux_loss > 0


def test_the_losses_of_only_padding_are_zero() -> None:
    padding = torch.zeros(6, dtype=torch.bool)
    assert load_balancing_loss([torch.randn(6, 4)], padding).item() == 0
    assert router_z_loss([torch.randn(6, 4)], padding).item() == 0


def test_padding_changes_neither_aux_loss_nor_its_gradient(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model()
    ids = torch.randint(6, 320, (1, 10))
    results = []
    for width in (0, 6):
        model.zero_grad()
        mask = F.pad(torch.ones_like(ids), (0, width))
        output = model(F.pad(ids, (0, width), value=1), attention_mask=mask, output_router_logits=True)
        output.aux_loss.backward()
        results.append((output.aux_loss.detach(), model.transformer.h[1].moe.gate.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)
