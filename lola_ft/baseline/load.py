"""Loading a dense model, as it is or with its linear layers in 4 bit."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from rich.console import Console
from torch import nn

from lola_ft.baseline.families import Family
from lola_ft.baseline.models import CLASSES
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.errors import CheckpointError
from lola_ft.quantization import NF4Linear, audit
from lola_ft.quantization.load import default_device, known_dtype, known_quantization, require_finite


def load_dense(
    path: str | Path,
    quantization: str | None = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> Any:
    """Load a dense model, ready for evaluation or for an adapter.

    With "nf4" the linear layers of attention and MLP become NF4 with double quantisation, as LOLA's do. All of it is
    read into memory first: these models are small.

    Raises:
        CheckpointError: Weights that are missing, too many, of another shape, or not finite.
        UserError: For an unknown quantization or dtype.
    """
    wanted, torch_dtype = known_quantization(quantization), known_dtype(dtype)
    target = torch.device(device) if device else default_device()
    checkpoint = BaseCheckpoint.open(path, revision)
    model = _read(checkpoint, checkpoint.dtype if wanted else torch_dtype)
    for name, parameter in model.named_parameters():
        require_finite(parameter, f"{checkpoint.folder}: tensor '{name}'")
    if wanted:
        _quantize(model, checkpoint.family, target)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.to(target, torch_dtype if tensor.is_floating_point() else None)
    model.config.dtype = torch_dtype
    model.config._name_or_path = str(path)
    model.base_id = "" if Path(path).exists() else str(path)  # a local path would mean nothing to others
    model.base_fingerprint, model.quantization = fingerprint(checkpoint), wanted
    if not quiet:
        how = "NF4 with double quantisation" if wanted else "not quantised"
        Console().print(audit(model).table(f"{path}, {how}, on {target}"))
    return model.eval()


def _read(checkpoint: BaseCheckpoint, dtype: torch.dtype) -> Any:
    """The model as transformers reads it; a weight that it would make up is refused."""
    model, info = CLASSES[checkpoint.family.name].from_pretrained(  # type: ignore[attr-defined]
        checkpoint.folder,
        config=checkpoint.config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for kind, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind]):
            shown = ", ".join(names[:3])
            raise CheckpointError(
                f"{checkpoint.folder}: {len(names)} weights that config.json calls for {what}: {shown}."
            )
    model.requires_grad_(False)
    return model


def _quantize(model: nn.Module, family: Family, device: torch.device) -> None:
    """Put 4-bit layers in the place of attention's and MLP's linear layers."""
    targets = (*family.attention, *family.mlp)
    found = [(name, module) for name, module in model.named_modules() if name.endswith(targets)]
    assert found, "no linear layer was found to quantise"
    for name, module in found:
        weight = module.weight.data.t() if family.in_by_out else module.weight.data
        layer = NF4Linear(weight.shape[1], weight.shape[0])
        layer.load_dense(weight.to(device))
        layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
