"""The check after the first backward pass notices an expert adapter that does not learn."""

from pathlib import Path

import pytest
import torch

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.training.callbacks.gradient_check import GradientCheck


@pytest.fixture
def model(tiny_base: Path) -> torch.nn.Module:
    base = lola_ft.load_base(tiny_base, dtype="float32", quiet=True)
    return add_adapter(base, AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=4, tune_router=True))


def step(model: torch.nn.Module, labels_from: int) -> str:
    check = GradientCheck(model)
    ids = torch.arange(6, 36).view(1, 30)
    labels = ids.clone()
    labels[:, :labels_from] = -100
    model.train()
    model(ids, labels=labels).loss.backward()
    check.on_pre_optimizer_step(None, None, None)
    return check.summary


def test_healthy_adapter_passes(model: torch.nn.Module) -> None:
    assert "all 34 trainable tensors got a gradient" in step(model, labels_from=0)


def test_expert_with_only_prompt_tokens_is_not_blamed(model: torch.nn.Module) -> None:
    """In the last layer, tokens whose outputs no label depends on teach their expert nothing, rightly."""
    assert "First step" in step(model, labels_from=29)


def test_detached_expert_is_found(model: torch.nn.Module) -> None:
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    wrapper.lora_B["default"].weight.register_hook(torch.zeros_like)
    with pytest.raises(AssertionError, match="saw tokens and got no gradient"):
        step(model, labels_from=0)


def test_tensor_without_gradient_is_found(model: torch.nn.Module) -> None:
    model.register_parameter("lora_unused", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="lora_unused"):
        step(model, labels_from=0)
