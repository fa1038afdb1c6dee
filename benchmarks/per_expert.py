"""The common way, to compare with: a module for every expert in a Python loop, bitsandbytes' layers, PEFT's LoRA.

It follows what the model's authors publish (one small network an expert, tokens picked out by a mask for each, eager
attention, full logits), in our own words, on today's libraries.
"""

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lola_ft.model import LolaForCausalLM
from lola_ft.model.experts import LolaExperts


class PerExpert(nn.Module):
    """In the place of `LolaExperts`: a list of networks, each called with the tokens that chose it."""

    def __init__(self, experts: LolaExperts, quantised: bool) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        for e in range(experts.num_experts):
            network = nn.Module()
            network.c_fc = linear(experts.up_proj[e].t(), experts.up_proj_bias[e], quantised)
            network.c_proj = linear(experts.down_proj[e].t(), experts.down_proj_bias[e], quantised)
            self.networks.append(network)

    def forward(self, x_TD: Tensor, expert_ids_T: Tensor, probs_T: Tensor, low_rank: object = None) -> Tensor:  # noqa: ARG002
        out_TD = torch.zeros_like(x_TD)
        chosen_ET = F.one_hot(expert_ids_T, len(self.networks)).t()
        for e, network in enumerate(self.networks):
            (tokens,) = torch.where(chosen_ET[e])
            y = network.c_proj(F.gelu(network.c_fc(x_TD[tokens]), approximate="tanh"))
            out_TD.index_add_(0, tokens, y * probs_T[tokens, None].to(y.dtype))
        return out_TD


def linear(weight: Tensor, bias: Tensor, quantised: bool) -> nn.Linear:
    """A linear layer of these numbers, bitsandbytes' if it shall be in 4 bit."""
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


def per_expert_model(dense: LolaForCausalLM, rank: int, quantised: bool) -> PeftModel:
    """The whole model that way, with LoRA on attention, dense MLP and experts; takes the dense model apart."""
    dense.set_attn_implementation("eager")
    dense.requires_grad_(False)
    for block in dense.transformer.h:
        for holder, names in ((block.attn, ("c_attn", "c_proj")), (getattr(block, "mlp", None), ("c_fc", "c_proj"))):
            for name in names if holder is not None else ():
                layer = getattr(holder, name)
                setattr(holder, name, linear(layer.weight, layer.bias, quantised))
        if block.is_moe:
            block.moe.experts = PerExpert(block.moe.experts, quantised)
    return get_peft_model(dense, lora_of(rank)).train()


def lora_of(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0)
