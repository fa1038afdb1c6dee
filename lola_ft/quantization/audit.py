"""The audit of a model: parameters and bytes by part and format. A dense expert in a 4-bit model is an error."""

from math import prod

import torch
from torch import Tensor, nn

from lola_ft.errors import CheckpointError
from lola_ft.families import Architecture, architecture_of
from lola_ft.families.parts import Audit, part_of_group
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear


def audit(model: nn.Module) -> Audit:
    """Count every parameter and every scale of a model, and tied weights once.

    Tables that are in no checkpoint, such as the angles of rotary positions, do not count.
    """
    result = Audit()
    config = getattr(model, "config", None)  # None for a part of a model: all other names are embeddings then
    architecture = architecture_of(config) if config else None
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        buffers = [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if "lora_" in module_name or architecture is None or architecture.group_of(f"{module_name}.{name}")
        ]
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                _count(result, _part_of(f"{module_name}.{name}", architecture), module, name, tensor)
    return result


def require_quantized(model: nn.Module) -> None:
    """Check that a model loaded in 4 bit holds no dense matrix of experts, attention or MLP.

    Raises:
        CheckpointError: If it does. The message names the first dense weights.
    """
    dense = [
        place.parameter
        for place in architecture_of(model.config).places.values()
        if place.quantized and not _is_four_bit(model.get_submodule(place.module), place.leaf)
    ]
    if dense := list(dict.fromkeys(dense)):
        raise CheckpointError(f"{len(dense)} weights are still dense after 4-bit loading: {', '.join(dense[:3])}.")


def _is_four_bit(module: nn.Module, name: str) -> bool:
    return isinstance(module, NF4Linear | NF4Experts) and getattr(module, name).dtype == torch.uint8


def _part_of(name: str, architecture: Architecture | None) -> str:
    """Return the part of a parameter or buffer, from its name in the model."""
    if "lora_" in name:
        return "adapter"
    if ".trained_bias." in name:
        return "biases"
    if name.startswith("score."):
        return "head"
    group = (architecture and architecture.group_of(name)) or "embeddings"
    return "adapter" if group == "router" and ".modules_to_save." in name else part_of_group(group)


def _count(result: Audit, part: str, module: nn.Module, name: str, tensor: Tensor) -> None:
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
