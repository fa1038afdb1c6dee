"""lola_ft's experts instead of transformers' own: the same numbers, as a single module and in a whole model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.loop_products import LoopProducts
from lola_ft.kernels.products import GroupedMatmuls, Products
from lola_ft.model.experts import FusedExperts

HIDDEN, INNER, EXPERTS = 32, 48, 6
STOCK: dict[str, type[nn.Module]] = {
    "deepseek_v3": DeepseekV3Experts,
    "granitemoe": GraniteMoeExperts,
    "mixtral": MixtralExperts,
    "nemotron_h": NemotronHExperts,
    "olmoe": OlmoeExperts,
    "qwen3_moe": Qwen3MoeExperts,
}


def small_config(model_type: str) -> PreTrainedConfig:
    """Return a small config, with the sizes under all names that the families use."""
    inner = {"intermediate_size": INNER, "moe_intermediate_size": INNER}
    experts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8}
    routing = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **sizes, **inner, **experts, **heads, **routing)


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


def twin_of(stock: Any, activation: str) -> FusedExperts:
    """Return lola_ft's module with the same weights, under the same parameter names."""
    ours = FusedExperts(
        stock.hidden_dim,
        stock.intermediate_dim,
        stock.num_experts,
        has_gate=stock.has_gate,
        has_bias=stock.has_bias,
        is_transposed=stock.is_transposed,
        activation=activation,
    )
    ours.load_state_dict(stock.state_dict())
    return ours


def outcome(call: Any, module: nn.Module, top_k: int) -> dict[str, Tensor]:
    """Return the output and the gradients of the input, the weights of the choices and every parameter."""
    generator = torch.Generator().manual_seed(top_k)
    x = torch.randn(40, HIDDEN, generator=generator).requires_grad_()
    ids = torch.rand(40, EXPERTS, generator=generator).topk(top_k).indices
    probs = torch.rand(40, top_k, generator=generator).requires_grad_()
    out = call(x, ids, probs)
    leaves = {"x": x, "probs": probs, **dict(module.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), torch.randn(out.shape, generator=generator))
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("products", [LoopProducts(), GroupedMatmuls()], ids=["loop", "grouped"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("model_type", STOCK)
def test_forward_and_every_gradient_are_those_of_transformers(model_type: str, top_k: int, products: Products) -> None:
    config = small_config(model_type)
    config._experts_implementation = "eager"
    stock = filled(STOCK[model_type](config))
    ours = twin_of(stock, "relu2" if model_type == "nemotron_h" else config.hidden_act)
    expected = outcome(stock, stock, top_k)
    actual = outcome(lambda *given: run_experts(ours, *given, {}, products), ours, top_k)
    assert set(actual) == set(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, atol=1e-4, rtol=1e-5)  # sums have another order


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "qwen3_moe", "granitemoe", "deepseek_v3"])
def test_a_whole_model_with_our_experts_gives_the_same_logits(model_type: str) -> None:
    model = filled(AutoModelForCausalLM.from_config(small_config(model_type))).eval()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids).logits
    names = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    for name in names:
        parent = model.get_submodule(name.removesuffix(".experts"))
        parent.experts = twin_of(parent.experts, model.config.hidden_act)
    assert names
    torch.testing.assert_close(
        model(ids).logits, expected, atol=1e-4, rtol=1e-4
    )  # sums have another order, layer by layer
