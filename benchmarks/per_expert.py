"""The common way, for comparison: one module per expert in a Python loop, bitsandbytes' layers, PEFT's LoRA.

It follows the code of the model's authors (GPT-2's network for each expert and each dense layer, GELU by its formula,
tokens selected for one expert after another, eager attention, full logits), rewritten for current libraries.
"""

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lola_ft.model import LolaForCausalLM
from lola_ft.model.experts import FusedExperts


class Network(nn.Module):
    """GPT-2's feed-forward network."""

    def __init__(self, c_fc: nn.Linear, c_proj: nn.Linear) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = c_fc, c_proj, ACT2FN["gelu_new"]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x_TD)))


class PerExpert(nn.Module):
    """A replacement of `FusedExperts`: a list of networks, each called with the tokens that chose it."""

    def __init__(self, experts: FusedExperts, quantised: bool) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            Network(
                linear(experts.up_proj[e].t(), experts.up_proj_bias[e], quantised),
                linear(experts.down_proj[e].t(), experts.down_proj_bias[e], quantised),
            )
            for e in range(experts.num_experts)
        )

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, probs_TK: Tensor, low_rank: object = None) -> Tensor:  # noqa: ARG002
        out_TD = torch.zeros_like(x_TD)
        for e, network in enumerate(self.networks):
            tokens, choices = torch.where(expert_ids_TK == e)
            if tokens.numel():
                out_TD.index_add_(0, tokens, network(x_TD[tokens]) * probs_TK[tokens, choices, None].to(x_TD.dtype))
        return out_TD


def linear(weight: Tensor, bias: Tensor, quantised: bool) -> nn.Linear:
    """Return a linear layer with this weight and bias; bitsandbytes' layer if it is to be in 4 bit."""
    outputs, inputs = weight.shape
    if not quantised:
        layer = nn.Linear(inputs, outputs, dtype=weight.dtype)
        layer.weight.data, layer.bias.data = weight.detach().contiguous(), bias.detach().clone()
        return layer.requires_grad_(False)
    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True)
    layer.support_avx512bf16_for_cpu = False  # it would break training on such CPUs (bitsandbytes 0.50)
    layer.weight = bnb.nn.Params4bit(
        weight.detach().contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to(weight.device)  # quantises; on a CPU, too


def again(layer: nn.Linear, quantised: bool) -> nn.Linear:
    return linear(layer.weight, layer.bias, quantised)


def per_expert_model(dense: LolaForCausalLM, rank: int, quantised: bool) -> PeftModel:
    """Turn a dense model into one of this kind, with LoRA on attention, dense MLP and experts."""
    dense.set_attn_implementation("eager")
    dense.requires_grad_(False)
    for block in dense.transformer.h:
        for name in ("c_attn", "c_proj"):
            setattr(block.attn, name, again(getattr(block.attn, name), quantised))
        if block.is_moe:
            block.moe.experts = PerExpert(block.moe.experts, quantised)
        else:
            block.mlp = Network(again(block.mlp.c_fc, quantised), again(block.mlp.c_proj, quantised))
    return get_peft_model(dense, lora_of(rank)).train()


def lora_of(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0)
