"""LoRA that starts at the rounding error of the 4-bit base (LoftQ with one step; Li et al. 2023, arXiv 2310.08659).

The base stays frozen. A and B become the best rank-R approximation of `W - nf4(W)`, so that training starts closer to
the original model. The adapter then belongs to the 4-bit base, because the original weights do not have the error that
it corrects. So it is merged with `--rounding nf4`.
"""

from collections import defaultdict
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.adapters.stacks import join_a, join_b, split_a, split_b
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import UserError
from lola_ft.quantization import NF4Experts, NF4Linear

_OVERSAMPLING, _ITERATIONS, _SEED = 8, 2, 0


@torch.no_grad()
def start_at_rounding_error(model: PeftModel, checkpoint: BaseCheckpoint, adapter_name: str = "default") -> str:
    """Set a new adapter's factors, and return a sentence about the share of the error that they correct.

    Args:
        checkpoint: The base's original weights.

    Raises:
        UserError: If no module with LoRA is in 4 bit.
    """
    modules = {name.replace(".base_layer", ""): module for name, module in model.base_model.model.named_modules()}
    wrappers = _wrappers(model)
    before = after = 0.0
    gates_and_ups: dict[tuple[str, int | None], dict[str, Tensor]] = defaultdict(dict)
    for entry in checkpoint:
        # 1. The wrapper of this weight; weights without LoRA, or not in 4 bit, are skipped.
        place = checkpoint.architecture.places[entry.name]
        module = modules.get(place.module)
        wrapper = wrappers.get(place.parameter if place.expert is not None else place.module)
        if wrapper is None or not place.quantized or adapter_name not in wrapper.lora_A:
            continue
        # 2. The weight after 4-bit rounding, out×in
        if isinstance(module, NF4Experts) and place.expert is not None:
            if place.expert not in wrapper.experts_of[adapter_name]:
                continue
            rounded = module.expert_weight(place.part or place.leaf, place.expert, torch.float32)
            rounded_OI = rounded.t() if place.in_by_out else rounded
        elif isinstance(wrapper.get_base_layer(), NF4Linear):
            rounded_OI = wrapper.get_base_layer().dense_weight(torch.float32)
        else:
            continue
        # 3. Its rounding error W - nf4(W) (O, I); for gate and up (2F, I)
        weight = entry.read(torch.float32).to(rounded_OI.device)
        error_OI = (weight.t() if place.in_by_out else weight) - rounded_OI
        if place.part is not None:  # gate and up share one pair: wait for the other one
            parts = gates_and_ups[place.parameter, place.expert]
            parts[place.part] = error_OI
            if len(parts) < 2:
                continue
            error_OI = torch.cat([parts.pop("gate_proj"), parts.pop("up_proj")])
        # 4. The best factors, and the squares of the error without and with them
        b_OR, a_RI = _best_factors(error_OI, wrapper.r[adapter_name], wrapper.scaling[adapter_name])
        _set_factors(wrapper, adapter_name, place.expert, a_RI, b_OR)
        before += error_OI.square().sum().item()
        after += (error_OI - wrapper.scaling[adapter_name] * b_OR @ a_RI).square().sum().item()
    if not before:
        raise UserError("init loftq: no weight with LoRA is in 4 bit, so there is no rounding error to start at.")
    model.peft_config[adapter_name].starts_at_rounding_error = True
    return f"LoRA starts at the 4-bit base's rounding error and corrects {1 - (after / before) ** 0.5:.1%} of it."


def _wrappers(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's layers by the name in memory of the module or expert parameter that they wrap."""
    found: dict[str, Any] = {}
    for name, module in model.base_model.model.named_modules():
        plain = name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            found[f"{plain}.{module.parameter_name}"] = module
        elif hasattr(module, "lora_A"):
            found[plain] = module
    return found


def _best_factors(error_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return B (O, R) and A (R, I) such that `scaling * B A` is the best approximation, with equal norms."""
    devices = [error_OI.device] if error_OI.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)  # the approximation uses random directions
        q = min(rank + _OVERSAMPLING, *error_OI.shape)
        u, s, v = torch.svd_lowrank(error_OI, q=q, niter=_ITERATIONS)  # error ~ u (O, q) diag(s) v.T (q, I)
    rank = min(rank, q)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).t()


def _set_factors(wrapper: Any, adapter_name: str, expert_id: int | None, a_RI: Tensor, b_OR: Tensor) -> None:
    a, b = wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    if expert_id is None:
        a[: len(a_RI)], b[:, : b_OR.shape[1]] = a_RI, b_OR
        return
    experts = wrapper.experts_of[adapter_name]
    place = experts.index(expert_id)
    a_ERI, b_EOR = split_a(a, len(experts)).clone(), split_b(b, len(experts)).clone()
    a_ERI[place, : len(a_RI)], b_EOR[place, :, : b_OR.shape[1]] = a_RI, b_OR
    a.copy_(join_a(a_ERI))
    b.copy_(join_b(b_EOR))
