"""What is in a model, by part and by format: parameters and bytes. Silence about a dense expert is the enemy."""

from math import prod

import torch
from torch import Tensor, nn

from lola_ft.errors import CheckpointError
from lola_ft.model.experts import FusedExperts
from lola_ft.model.parts import Audit, part_of
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear


def audit(model: nn.Module) -> Audit:
    """Count every parameter and every scale of a model, tied weights once."""
    result = Audit()
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                _count(result, f"{module_name}.{name}", module, name, tensor)
    return result


def require_quantized(model: nn.Module) -> None:
    """Refuse a model loaded in 4 bit that still holds a dense expert, attention or MLP weight.

    Raises:
        CheckpointError: Naming the first dense weights.
    """
    dense = [
        f"{name}.{projection}"
        for name, module in model.named_modules()
        if isinstance(module, FusedExperts)
        for projection in module.shapes
        if getattr(module, projection).dtype != torch.uint8
    ]
    dense += [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and part_of(name) in ("attention", "dense mlp")
    ]
    if dense:
        raise CheckpointError(f"{len(dense)} weights are still dense after 4-bit loading: {', '.join(dense[:3])}.")


def _count(result: Audit, full_name: str, module: nn.Module, name: str, tensor: Tensor) -> None:
    part = part_of(full_name)
    num_bytes = tensor.numel() * tensor.element_size()
    kind = str(tensor.dtype).removeprefix("torch.")
    parameters = tensor.numel()
    if isinstance(module, NF4Linear) and name == "weight":
        state = module.weight.quant_state
        scales = (state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code)
        kind, parameters = "nf4", state.shape.numel()
        num_bytes += sum(scale.numel() * scale.element_size() for scale in scales)
    elif isinstance(module, NF4Experts) and not name.endswith("_bias"):
        kind = "nf4"
        parameters = module.num_experts * prod(module.shapes[name]) if name in module.shapes else 0
    count = result.counts[part, kind]
    count.parameters += parameters
    count.num_bytes += num_bytes
