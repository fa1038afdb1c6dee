"""Loading a base model, dense or in 4 bit, from a folder or the Hub."""

from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from lola_ft.errors import UserError
from lola_ft.model import LolaForCausalLM
from lola_ft.model.experts import LolaExperts
from lola_ft.model.fingerprint import fingerprint
from lola_ft.model.hub_checkpoint import HubCheckpoint
from lola_ft.model.layout import place_of
from lola_ft.quantization.audit import audit, require_quantized
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear, is_quantizable

QUANTIZATIONS = ("nf4", None)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_base(
    path: str | Path,
    quantization: str | None = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> LolaForCausalLM:
    """Load LOLA in the Hub's layout, ready for evaluation or for an adapter.

    With "nf4", attention, dense MLP and every expert become NF4 with double quantisation while loading, one tensor at
    a time; embeddings, norms, biases and router stay in `dtype`.

    Args:
        path: A checkpoint's folder or a Hub id.
        quantization: "nf4" or None.
        dtype: What stays dense is held, and everything is computed, in this dtype.
        device: Where to; the GPU if there is one.
        quiet: Do not print the audit (parameters and bytes by part and format).

    Raises:
        CheckpointError: Naming file and tensor; also if a weight stayed dense that should not.
        UserError: For an unknown quantization or dtype.
    """
    if quantization == "none":
        quantization = None
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization '{quantization}' is not known; use 'nf4' or None.")
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if torch_dtype is None or torch_dtype not in DTYPES.values():
        raise UserError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}.")
    target = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = HubCheckpoint.open(path, revision)
    if quantization is None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch_dtype).to(target)
    else:
        model = _load_nf4(checkpoint, torch_dtype, target)
        require_quantized(model)
    model.eval()
    model.config._name_or_path = str(path)
    model.base_id = "" if Path(path).exists() else str(path)  # a local path would mean nothing to others
    model.base_fingerprint = fingerprint(checkpoint)
    if not quiet:
        title = f"{path}, {'NF4 with double quantisation' if quantization else 'not quantised'}, on {target}"
        Console().print(audit(model).table(title))
    return model


def _load_nf4(checkpoint: HubCheckpoint, dtype: torch.dtype, device: torch.device) -> LolaForCausalLM:
    with torch.device("meta"):
        model = LolaForCausalLM(checkpoint.config)
    _make_nf4_modules(model, device)
    for entry in checkpoint:
        place = place_of(entry.name)
        module_name, _, name = place.parameter.rpartition(".")
        module = model.get_submodule(module_name)
        # Weights are quantised from what is stored: a cast first would round twice.
        if isinstance(module, NF4Experts) and not name.endswith("_bias"):
            module.load_expert(name, place.expert_id or 0, entry.read().to(device))
        elif isinstance(module, NF4Linear) and name == "weight":
            module.load_dense(entry.read().to(device).t())
        elif place.expert_id is not None:
            _bias_stack(module, name, dtype, device).data[place.expert_id] = entry.read()
        else:
            setattr(module, name, nn.Parameter(entry.read(dtype).to(device), requires_grad=False))
    model.tie_weights()
    model.config.dtype = dtype
    model.quantization = "nf4"
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"parameters were left without weights: {left[:3]}"
    return model


def _make_nf4_modules(model: LolaForCausalLM, device: torch.device) -> None:
    """Replace, on the meta device, every linear layer and every MoE layer's experts by their 4-bit form."""
    for name, module in list(model.transformer.named_modules()):
        parent = model.transformer.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if is_quantizable(module):
            setattr(parent, leaf, NF4Linear(module.in_features, module.out_features))
        elif type(module) is LolaExperts:
            hidden_size, inner_size = module.shapes["up_proj"]
            with torch.device("meta"):
                experts = NF4Experts(hidden_size, inner_size, module.num_experts)
            experts.allocate(device)
            setattr(parent, leaf, experts)


def _bias_stack(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """The (E, …) bias parameter to fill, allocated at the first expert's bias."""
    stack = getattr(module, name)
    if stack.is_meta:
        stack = nn.Parameter(torch.empty_like(stack, dtype=dtype, device=device), requires_grad=False)
        setattr(module, name, stack)
    return stack
