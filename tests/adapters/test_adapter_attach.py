"""The weights that an attached adapter trains; and that it has no effect when it is new or disabled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from lola_ft.adapters import AdapterSettings, add_adapter, load_adapter, lora_config
from lola_ft.adapters.load_save import adapter_weights
from lola_ft.adapters.on_disk import write_adapter
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.errors import AdapterError, UserError
from tests.tiny import TINY

# Float32 sums have another order.
ROUNDING = 1e-5

ALL = AdapterSettings(attention_rank=4, mlp_rank=6, expert_rank=2, tune_router=True)
D, F, E, MOE, DENSE = 64, 128, 4, 2, 2  # of the tiny base
PARAMETERS = {
    "attention": (AdapterSettings(attention_rank=4), (MOE + DENSE) * 4 * (D + 3 * D + D + D)),
    "mlp": (AdapterSettings(mlp_rank=6), DENSE * 6 * 2 * (D + F)),
    "experts": (AdapterSettings(expert_rank=2), MOE * E * 2 * 2 * (D + F)),
    "router": (AdapterSettings(tune_router=True), MOE * E * D),
}


def randomize(model: PeftModel, adapter: str = "default", seed: int = 0) -> PeftModel:
    """Set all of an adapter's tensors to random numbers. (A new B is zero.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def frozen_state(model: PeftModel) -> dict[str, Tensor]:
    """Return every parameter and buffer that is not the adapter's, including 4-bit codes and scales."""
    state = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    state |= dict(model.named_buffers())
    for name, module in model.named_modules():
        if quant_state := getattr(getattr(module, "weight", None), "quant_state", None):
            state[f"{name}.absmax"] = quant_state.absmax
            state[f"{name}.absmax2"] = quant_state.state2.absmax
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("group", PARAMETERS)
def test_only_the_chosen_group_trains(
    group: str, quantization: str | None, fresh: Callable[..., Any], ids: Tensor
) -> None:
    settings, expected = PARAMETERS[group]
    model = add_adapter(fresh(quantization), settings)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == expected
    marker = {"attention": ".attn.", "mlp": ".mlp.", "experts": ".experts.", "router": ".gate."}[group]
    assert all(marker in name for name in trained)
    model(ids, labels=ids).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(trained)


def test_groups_add_up(fresh: Callable[..., Any]) -> None:
    model = add_adapter(fresh(), ALL)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == sum(expected for _, expected in PARAMETERS.values())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="Nothing would be trained"):
        lora_config(AdapterSettings(), TINY)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_adapter_is_float32_on_a_16_bit_base(quantization: str | None, fresh: Callable[..., Any]) -> None:
    model = add_adapter(fresh(quantization, "bfloat16"), ALL)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        else:
            assert parameter.dtype in (torch.bfloat16, torch.uint8), name


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_new_or_disabled_adapter_has_no_effect(
    quantization: str | None, fresh: Callable[..., Any], ids: Tensor
) -> None:
    base = fresh(quantization)
    expected = base(ids).logits
    model = add_adapter(base, ALL).eval()
    assert torch.equal(model(ids).logits, expected)
    randomize(model)
    assert (model(ids).logits - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)


def test_disabling_after_a_merge_in_memory_gives_the_base(fresh: Callable[..., Any], ids: Tensor) -> None:
    base = fresh()
    expected = base(ids).logits
    model = randomize(add_adapter(base, AdapterSettings(attention_rank=4, expert_rank=2))).eval()
    adapted = model(ids).logits
    model.merge_adapter()
    assert_close(model(ids).logits, adapted, atol=ROUNDING, rtol=0)
    with model.disable_adapter():
        assert_close(model(ids).logits, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("group", ["attention", "mlp", "experts"])
def test_dropout_acts_in_training_only(group: str, fresh: Callable[..., Any], ids: Tensor) -> None:
    ranks: dict[str, Any] = {f"{group.removesuffix('s') if group == 'experts' else group}_rank": 4}
    model = randomize(add_adapter(fresh(), AdapterSettings(dropout=0.5, **ranks)))
    still = randomize(add_adapter(fresh(), AdapterSettings(dropout=0.0, **ranks)))
    expected = still.train()(ids).logits
    assert torch.equal(still(ids).logits, expected)
    assert torch.equal(model.eval()(ids).logits, expected)
    model.train()
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)


def test_two_active_adapters_add_up(fresh: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    first = AdapterSettings(attention_rank=4, mlp_rank=2, expert_rank=2, alpha=8.0)
    second = AdapterSettings(attention_rank=3, mlp_rank=5, expert_rank=6, alpha=5.0)
    model = randomize(add_adapter(fresh(), first)).eval()
    model.add_adapter("second", lora_config(second, TINY))
    randomize(model, "second", seed=1)
    weights, alone = {}, {}
    for name in ("default", "second"):
        model.set_adapter(name)
        weights[name], alone[name] = adapter_weights(model), model(ids).logits
    model.base_model.set_adapter(["default", "second"])

    # One adapter that holds both: the ranks side by side, each B with its own scaling.
    joined = AdapterWeights(TINY)
    for module, pair in weights["default"].pairs.items():
        other = weights["second"].pairs[module]
        b = [part.b * weights[name].scaling(module) for name, part in (("default", pair), ("second", other))]
        rank = pair.rank + other.rank
        joined.pairs[module] = LoraPair(torch.cat([pair.a, other.a]), torch.cat(b, dim=1), alpha=float(rank))
    write_adapter(joined, tmp_path / "joined", "peft")
    expected = load_adapter(fresh(), tmp_path / "joined")(ids).logits
    both = model(ids).logits
    assert_close(both, expected, atol=ROUNDING, rtol=0)
    assert all((both - logits).abs().max() > 0.01 for logits in alone.values())
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, alone["default"])


def test_two_active_adapters_with_different_dropout_do_not_train(fresh: Callable[..., Any], ids: Tensor) -> None:
    model = add_adapter(fresh(), AdapterSettings(expert_rank=2, dropout=0.1))
    model.add_adapter("second", lora_config(AdapterSettings(expert_rank=2), TINY))
    model.base_model.set_adapter(["default", "second"])
    model.eval()(ids)
    with pytest.raises(AdapterError, match="default, second have different dropout"):
        model.train()(ids)


@pytest.mark.parametrize("settings", [ALL, AdapterSettings(expert_rank=3), AdapterSettings(tune_router=True)])
def test_a_step_on_a_4_bit_base_changes_only_the_adapter(
    settings: AdapterSettings, fresh: Callable[..., Any], ids: Tensor
) -> None:
    model = add_adapter(fresh("nf4", "bfloat16"), settings)
    frozen = frozen_state(model)
    assert any(tensor.dtype == torch.uint8 for tensor in frozen.values())
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert losses[-1] < losses[0]
    after = frozen_state(model)
    assert after.keys() == frozen.keys()
    assert [name for name in frozen if not torch.equal(after[name], frozen[name])] == []
    moved = dict(model.named_parameters())
    assert [name for name in trained if torch.equal(moved[name], trained[name])] == []


@pytest.mark.parametrize("settings", [ALL, AdapterSettings(attention_rank=2), AdapterSettings(expert_rank=2)])
def test_a_4_bit_base_is_not_merged_in_memory(
    settings: AdapterSettings, fresh: Callable[..., Any], ids: Tensor
) -> None:
    model = randomize(add_adapter(fresh("nf4"), settings)).eval()
    expected, frozen = model(ids).logits, frozen_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"round the adapter away. Use `lola-ft merge`"):
            merge()
        assert torch.equal(model(ids).logits, expected)
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_state(model).items())


def test_a_second_adapter_needs_the_returned_model_and_another_name(
    fresh: Callable[..., Any], everything: AdapterWeights, tmp_path: Path, ids: Tensor
) -> None:
    """The base is changed in place. So it takes no second adapter, and the returned model takes one by another name."""
    write_adapter(everything, tmp_path / "adapter", "peft")
    base = fresh()
    model = load_adapter(base, tmp_path / "adapter")
    expected = model(ids).logits
    for taken, message in ((base, "give the PeftModel around it"), (model, "already has an adapter 'default'")):
        with pytest.raises(UserError, match=message):
            load_adapter(taken, tmp_path / "adapter")
        with pytest.raises(UserError, match=message):
            add_adapter(taken, ALL)
    assert torch.equal(model(ids).logits, expected)
