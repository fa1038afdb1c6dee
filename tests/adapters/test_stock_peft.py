"""Stock PEFT, without lola_ft's classes, loads adapters that lola_ft stored in its layout and computes the same."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as StockLinear
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lola_ft.adapters import AdapterSettings, add_adapter, load_adapter, save_adapter
from lola_ft.adapters.on_disk import write_adapter
from lola_ft.adapters.stacks import split_a, split_b
from lola_ft.adapters.weights import AdapterWeights
from tests.grids import slow_but

# Stock PEFT adds B·A to the weight before it multiplies. lola_ft multiplies with A, then B: float32 rounding.
PARITY = 1e-5

ATTENTION = {"c_attn": (4, 8.0), "attn_c_proj": (4, 8.0)}
MLP = {"mlp_up": (6, 8.0), "mlp_down": (6, 8.0)}
EXPERTS = {"up": (2, 8.0), "down": (2, 8.0)}
MIXES: dict[str, dict[str, Any]] = {
    "all groups, one rank each": ATTENTION | MLP | EXPERTS,
    "attention only": ATTENTION,
    "mlp only": MLP,
    "experts only": EXPERTS,
    "up projection only": {"up": (3, 8.0)},
    "down projection only": ATTENTION | {"down": (3, 8.0)},
    "router tuned": ATTENTION | EXPERTS | {"router": True},
    "router alone": {"router": True},
    "router with LoRA": ATTENTION | EXPERTS | {"gate": (2, 8.0)},
    "norms": MLP | EXPERTS | {"norms": True},
    "dora": ATTENTION | MLP | {"dora": True},
    "rslora": ATTENTION | MLP | EXPERTS | {"rslora": True},
    "every rank and alpha another": {
        "c_attn": (4, 8.0),
        "attn_c_proj": (3, 7.0),
        "mlp_up": (6, 12.5),
        "mlp_down": (5, 1.0),
        "up": (2, 6.0),
        "down": (8, 3.0),
    },
    "one layer of each kind": ATTENTION
    | MLP
    | EXPERTS
    | {"only": lambda module: module.startswith(("transformer.h.2.", "transformer.h.3."))},
    "two experts": {"up": (2, 8.0), "down": (2, 8.0), "only": lambda module: ".experts.1." in module},
}


def load_stock(base: Path, adapter: Path, **options: Any) -> tuple[peft.PeftModel, bool]:
    """Load as a user without lola_ft would. Also return True if PEFT missed tensors for places that it made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, **options
        )
    assert not [str(w.message) for w in caught if "unexpected" in str(w.message).lower()]
    return model.eval(), any("missing adapter keys" in str(w.message) for w in caught)


def gradients(model: peft.PeftModel, ids: Tensor) -> dict[str, Tensor | None]:
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


FAST_MIXES = ("router with LoRA", "dora", "every rank and alpha another")


@pytest.mark.parametrize("mix", slow_but(FAST_MIXES, MIXES))
def test_stock_peft_computes_the_same_logits_and_gradients(
    mix: str,
    tiny_base: Path,
    fresh: Callable[..., Any],
    make_weights: Callable[..., AdapterWeights],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    write_adapter(make_weights(**MIXES[mix]), tmp_path / "adapter", "peft")
    ours = load_adapter(fresh(), tmp_path / "adapter", trainable=True).eval()
    stock, missed = load_stock(tiny_base, tmp_path / "adapter", is_trainable=True)

    # PEFT's config cannot select layers, so PEFT makes places in all layers. The additional ones stay zero.
    assert missed == (mix == "one layer of each kind")
    classes = {type(module) for module in stock.modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert classes <= {StockLinear, StockParamWrapper}
    groups = MIXES[mix].keys() - {"router", "rslora", "only"}
    assert (StockParamWrapper in classes) == bool({"up", "down"} & groups)
    assert (StockLinear in classes) == bool(groups - {"up", "down"})

    base_logits = fresh()(ids).logits
    assert (ours(ids).logits - base_logits).abs().max() > 0.01
    assert (ours(ids).logits - stock(ids).logits).abs().max() < PARITY
    ours_grads, stock_grads = gradients(ours, ids), gradients(stock, ids)
    assert set(ours_grads) <= set(stock_grads)
    assert missed or set(ours_grads) == set(stock_grads)
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in ours_grads.values())
    for name, grad in ours_grads.items():
        if mix == "two experts":  # lola_ft holds only expert 1, stock PEFT also zeros for the others
            split = split_a if "lora_A" in name else split_b
            grad, stock_grads[name] = split(grad, 1)[0], split(stock_grads[name], 4)[1]
        assert_close(grad, stock_grads[name], atol=PARITY, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_s_update_is_stock_peft_s(
    tiny_base: Path, make_weights: Callable[..., AdapterWeights], tmp_path: Path
) -> None:
    """A (E*R, in) is expert-slowest, B (out, R*E) expert-fastest. Another order has only the right shapes."""
    weights = make_weights(up=(3, 8.0), down=(2, 6.0))
    write_adapter(weights, tmp_path / "adapter", "peft")
    stock, _ = load_stock(tiny_base, tmp_path / "adapter")
    wrappers = {
        (name.partition("base_model.model.")[2].partition(".experts")[0], module.parameter_name): module
        for name, module in stock.named_modules()
        if isinstance(module, StockParamWrapper)
    }
    assert len(wrappers) == 4
    for (moe, projection), wrapper in wrappers.items():
        disk_name = {"up_proj": "c_fc", "down_proj": "c_proj"}[projection]
        delta_EIO = wrapper.get_delta_weight("default")
        for e in range(4):
            assert_close(weights.delta(f"{moe}.experts.{e}.{disk_name}"), delta_EIO[e], msg=f"{moe} {projection} {e}")


def test_what_training_attaches_is_what_stock_peft_loads(
    tiny_base: Path, fresh: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    settings = AdapterSettings(
        attention_rank=4, mlp_rank=6, expert_rank=2, alpha=12.0, dropout=0.1, rslora=True, tune_router=True
    )
    model = add_adapter(fresh("nf4"), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # two steps, because A has no gradient while B is zero
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    save_adapter(model, tmp_path / "adapter")

    stock, missed = load_stock(tiny_base, tmp_path / "adapter")
    assert not missed
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loaded = dict(stock.named_parameters())
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in trained.items())
    ours = load_adapter(fresh(), tmp_path / "adapter")
    assert (ours(ids).logits - fresh()(ids).logits).abs().max() > 0.01
    assert (ours(ids).logits - stock(ids).logits).abs().max() < PARITY
