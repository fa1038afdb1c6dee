"""Expert LoRA on every layout of experts: names, shapes and numbers are those of stock PEFT."""

from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.testing import assert_close

from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.errors import AdapterError
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts
from tests.kernels.conftest import LAYOUTS


class Layer(nn.Module):
    """A module with experts under a name whose ending PEFT finds."""

    def __init__(self, experts: FusedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        return self.experts(x, ids, probs)


def make_layer(kind: type[FusedExperts], settings: dict[str, Any]) -> Layer:
    generator = torch.Generator().manual_seed(0)
    experts = kind(64, 128, 4, **settings)
    if isinstance(experts, NF4Experts):
        experts.allocate(torch.device("cpu"))
    for part in experts.parts:
        for e in range(4):
            experts.load_expert(part, e, torch.randn(experts.part_shape(part), generator=generator) * 0.2)
    for name, bias in experts.named_parameters():
        if name.endswith("_bias"):
            bias.data = torch.randn(bias.shape, generator=generator)
    return Layer(experts)


def adapted(layer: Layer, ours: bool) -> peft.PeftModel:
    targets = [f"experts.{name}" for name in layer.experts.shapes]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    if ours:
        config._register_custom_module({FusedExperts: ParamWrapper, NF4Experts: ParamWrapper})
    return peft.get_peft_model(layer, config)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(20, 4, generator=generator).topk(2).indices
    return torch.randn(20, 64, generator=generator), ids, torch.rand(20, 2, generator=generator)


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_names_shapes_output_gradients_and_merge_are_stock_pefts(settings: dict[str, Any]) -> None:
    ours, stock = (adapted(make_layer(FusedExperts, settings), ours) for ours in (True, False))
    generator = torch.Generator().manual_seed(1)
    state = get_peft_model_state_dict(stock)
    state = {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in state.items()}
    first, last = ours.base_model.model.experts.get_base_layer().shapes
    assert state["base_model.model.experts.base_layer.lora_A.weight"].shape[1] == 64, f"{first} is innermost"
    assert state["base_model.model.experts.lora_A.weight"].shape[1] == 128, f"{last} is outermost"
    assert {name: t.shape for name, t in get_peft_model_state_dict(ours).items()} == {
        name: t.shape for name, t in state.items()
    }
    grads = []
    for model in (ours, stock):
        set_peft_model_state_dict(model, state)
        out = model(*batch())
        named = {name: p for name, p in model.named_parameters() if "lora_" in name}
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads.append(
            {"out": out.detach(), **dict(zip(named, torch.autograd.grad(out, named.values(), weights), strict=True))}
        )
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[1].items():
        # PEFT multiplies with W + BA, lola_ft adds BAx, which rounds differently.
        assert_close(grads[0][name], wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    ours.merge_adapter()
    assert_close(ours(*batch()), grads[0]["out"], atol=1e-4 * float(grads[0]["out"].abs().max()), rtol=1e-4)


def test_4_bit_experts_have_the_same_names_and_shapes_and_refuse_a_merge_in_memory() -> None:
    for settings in LAYOUTS.values():
        ours, dense = adapted(make_layer(NF4Experts, settings), True), adapted(make_layer(FusedExperts, settings), True)
        shapes, wanted = (
            {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()} for model in (ours, dense)
        )
        assert shapes == wanted
        with pytest.raises(AdapterError, match="lola-ft merge"):
            ours.merge_adapter()
