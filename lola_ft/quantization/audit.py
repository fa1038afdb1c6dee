"""What is in a model, by part and by format: parameters and bytes. Silence about a dense expert is the enemy."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor, nn

from lola_ft.errors import CheckpointError
from lola_ft.model.experts import PROJECTIONS, LolaExperts
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear

PARTS = ("embeddings", "attention", "dense mlp", "experts", "router", "norms", "head", "adapter", "biases")


@dataclass
class Count:
    """Logical parameters (a 4-bit weight counts as what it stands for) and the bytes they take."""

    parameters: int = 0
    num_bytes: int = 0


@dataclass
class Audit:
    """Counts by (part, format), for instance ("experts", "nf4") or ("norms", "bfloat16")."""

    counts: dict[tuple[str, str], Count] = field(default_factory=lambda: defaultdict(Count))

    @property
    def total_bytes(self) -> int:
        return sum(count.num_bytes for count in self.counts.values())

    @property
    def total_parameters(self) -> int:
        return sum(count.parameters for count in self.counts.values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """`{"experts nf4": {"parameters": …, "bytes": …}, …}` for the manifest."""
        return {
            f"{part} {kind}": {"parameters": count.parameters, "bytes": count.num_bytes}
            for (part, kind), count in self._sorted()
        }

    def table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for heading in ("part", "format"):
            table.add_column(heading)
        for heading in ("parameters", "bytes"):
            table.add_column(heading, justify="right")
        for (part, kind), count in self._sorted():
            table.add_row(part, kind, f"{count.parameters:,}", f"{count.num_bytes:,}")
        table.add_section()
        table.add_row("all", "", f"{self.total_parameters:,}", f"{self.total_bytes:,}")
        return table

    def _sorted(self) -> list[tuple[tuple[str, str], Count]]:
        return sorted(self.counts.items(), key=lambda item: (PARTS.index(item[0][0]), item[0][1]))


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
        if isinstance(module, LolaExperts)
        for projection in PROJECTIONS
        if getattr(module, projection).dtype != torch.uint8
    ]
    dense += [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and _part_of(name) in ("attention", "dense mlp")
    ]
    if dense:
        raise CheckpointError(f"{len(dense)} weights are still dense after 4-bit loading: {', '.join(dense[:3])}.")


def _count(result: Audit, full_name: str, module: nn.Module, name: str, tensor: Tensor) -> None:
    part = _part_of(full_name)
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
        in_features, out_features = module.shapes["up_proj"]
        parameters = module.num_experts * in_features * out_features if name in PROJECTIONS else 0
    count = result.counts[part, kind]
    count.parameters += parameters
    count.num_bytes += num_bytes


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "adapter"
    if ".trained_bias." in name:
        return "biases"
    if name.startswith("score."):
        return "head"
    if ".moe.gate" in name:
        return "adapter" if "modules_to_save" in name else "router"
    for marker, part in ((".attn", "attention"), (".mlp", "dense mlp"), (".experts", "experts"), (".ln_", "norms")):
        if marker in name:
            return part
    return "embeddings"
