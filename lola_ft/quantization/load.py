"""Loading a base model, dense or in 4 bit, from a folder or the Hub."""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GenerationConfig

from lola_ft.errors import CheckpointError, UserError
from lola_ft.kernels.precision import DTYPES
from lola_ft.memory import give_back_freed_memory
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.model.experts import LolaExperts
from lola_ft.model.fingerprint import fingerprint
from lola_ft.model.heads import LolaForSequenceClassification, LolaForTokenClassification
from lola_ft.model.hub_checkpoint import HubCheckpoint
from lola_ft.model.layers import init_weights
from lola_ft.model.layout import place_of
from lola_ft.model.modeling import LolaPreTrainedModel
from lola_ft.model.safetensors_file import TensorEntry, read_ahead
from lola_ft.quantization.audit import audit, require_quantized
from lola_ft.quantization.cache import SOURCE_FILE, is_cache, matching_cache, read_cache, source_identity, write_cache
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear, is_quantizable

QUANTIZATIONS = ("nf4", None)
HEADS: dict[str, type[LolaPreTrainedModel]] = {
    "causal_lm": LolaForCausalLM,
    "sequence_classification": LolaForSequenceClassification,
    "token_classification": LolaForTokenClassification,
}


def load_base(
    path: str | Path,
    quantization: str | None = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    revision: str | None = None,
    quiet: bool = False,
    head: str = "causal_lm",
    num_labels: int = 2,
) -> LolaPreTrainedModel:
    """Load LOLA in the Hub's layout, ready for evaluation or for an adapter.

    With "nf4", attention, dense MLP and every expert become NF4 with double quantisation while loading, one tensor at
    a time; embeddings, norms, biases and router stay in `dtype`.

    Args:
        path: A checkpoint's folder or a Hub id; or the folder of a quantised base that `quantize_base` wrote.
        quantization: "nf4" or None.
        dtype: What stays dense is held, and everything is computed, in this dtype.
        device: Where to; the GPU if there is one.
        quiet: Do not print the audit (parameters and bytes by part and format).
        head: "causal_lm"; or "sequence_classification" or "token_classification", a fresh layer of `num_labels`
            outputs, which stays in `dtype`.

    Raises:
        CheckpointError: Naming file and tensor; also for weights that are not finite, for an output head that is not
            the embeddings, or if a weight stayed dense that should not.
        UserError: For an unknown quantization, dtype or head.
    """
    quantization, torch_dtype = known_quantization(quantization), known_dtype(dtype)
    if head not in HEADS:
        raise UserError(f"head '{head}' is not known; use one of {', '.join(HEADS)}.")
    target = torch.device(device) if device else default_device()
    if is_cache(path):
        if head != "causal_lm":
            raise UserError(f"{path}: a base of which only the 4-bit form is there takes no head; give the original.")
        return _load_quantized(Path(path), quantization, torch_dtype, target)
    checkpoint = HubCheckpoint.open(path, revision)
    checkpoint.check_tied_head()
    base_fingerprint = fingerprint(checkpoint)
    labels = {} if head == "causal_lm" else {"num_labels": num_labels}
    if quantization is None:
        model = HEADS[head].from_pretrained(checkpoint.folder, dtype=torch_dtype, **labels).to(target)
        for name, parameter in model.named_parameters():
            require_finite(parameter, f"{checkpoint.folder}: tensor '{name}'")
    else:
        cached = matching_cache(source_identity(checkpoint, base_fingerprint, torch_dtype))
        model = _load_nf4(checkpoint, cached, HEADS[head], labels, torch_dtype, target)
        require_quantized(model)
    model.eval()
    model.config._name_or_path = str(path)
    model.base_id = "" if Path(path).exists() else str(path)  # a local path would mean nothing to others
    model.base_revision = revision if model.base_id and revision != "main" else None
    model.base_fingerprint = base_fingerprint
    if not quiet:
        title = f"{path}, {'NF4 with double quantisation' if quantization else 'not quantised'}, on {target}"
        Console().print(audit(model).table(title))
    return model


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantize_base(
    path: str | Path, dtype: str | torch.dtype = "bfloat16", revision: str | None = None, quiet: bool = False
) -> Path:
    """Quantise a base once and keep the result in the cache, where `load_base` finds it; returns its folder.

    Raises:
        CheckpointError: As `load_base`; also if the cache cannot be written. Nothing partial is left.
    """
    torch_dtype = known_dtype(dtype)
    checkpoint = HubCheckpoint.open(path, revision)
    model = load_base(path, "nf4", torch_dtype, "cpu", revision, quiet)
    identity = source_identity(checkpoint, model.base_fingerprint, torch_dtype)
    return matching_cache(identity) or write_cache(model, identity, checkpoint.folder)


def known_quantization(quantization: str | None) -> str | None:
    """The quantization by its name; "none" is None.

    Raises:
        UserError: One that is not known.
    """
    wanted = None if quantization == "none" else quantization
    if wanted not in QUANTIZATIONS:
        raise UserError(f"quantization '{wanted}' is not known; use 'nf4' or None.")
    return wanted


def known_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype by its name.

    Raises:
        UserError: One that weights cannot be held in.
    """
    known = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if known is None or known not in DTYPES.values():
        raise UserError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}.")
    return known


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse a weight with NaN or infinite values: in 4 bit they would spoil their whole block, unseen.

    Raises:
        CheckpointError: Beginning with `what`.
    """
    extremes = torch.stack(torch.aminmax(tensor))  # NaN if any value is
    if not torch.isfinite(extremes).all():
        raise CheckpointError(f"{what} holds NaN or infinite values. The file is damaged, or its training diverged.")


def _load_nf4(
    checkpoint: HubCheckpoint,
    cached: Path | None,
    model_class: type[LolaPreTrainedModel],
    labels: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> LolaPreTrainedModel:
    config = checkpoint.config
    for name, value in labels.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = model_class(config)
    _make_nf4_modules(model, device)
    if cached is not None:
        read_cache(model, cached, device)
    else:
        _quantize_into(model, checkpoint, dtype, device)
    _make_head(model, dtype, device)
    model.tie_weights()
    model.config.dtype = dtype
    model.quantization = "nf4"
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"parameters were left without weights: {left[:3]}"
    return model


def _load_quantized(
    folder: Path, quantization: str | None, dtype: torch.dtype, device: torch.device
) -> LolaPreTrainedModel:
    """Load a base of which only the 4-bit form is there."""
    if quantization is None:
        raise UserError(f"{folder}: holds a base in 4 bit; load it with quantization='nf4'.")
    with torch.device("meta"):
        model = LolaForCausalLM(LolaConfig.from_pretrained(folder))
    _make_nf4_modules(model, device)
    read_cache(model, folder, device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    model.config.dtype = dtype
    model.quantization = "nf4"
    model.base_id = ""
    model.base_fingerprint = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["fingerprint"]
    return model.eval()


def _quantize_into(
    model: LolaPreTrainedModel, checkpoint: HubCheckpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Read the checkpoint in file order; quantise or cast each tensor into its place, and free it."""

    def quantised_module(entry: TensorEntry) -> NF4Experts | NF4Linear | None:
        module_name, _, name = place_of(entry.name).parameter.rpartition(".")
        module = model.get_submodule(module_name)
        return module if isinstance(module, NF4Experts | NF4Linear) and not name.endswith("bias") else None

    # Weights are quantised from what is stored: a cast first would round twice.
    wanted = [(entry, None if quantised_module(entry) else dtype) for entry in checkpoint]
    for number, (entry, read) in enumerate(read_ahead(wanted)):
        if number % 16 == 0:
            give_back_freed_memory()
        tensor = read.to(device)
        require_finite(tensor, f"{entry.file}: tensor '{entry.name}'")
        place = place_of(entry.name)
        module_name, _, name = place.parameter.rpartition(".")
        quantised = quantised_module(entry)
        if isinstance(quantised, NF4Experts):
            quantised.load_expert(name, place.expert_id or 0, tensor)
        elif quantised is not None:
            quantised.load_dense(tensor.t())
        elif place.expert_id is not None:
            _bias_stack(model.get_submodule(module_name), name, dtype, device).data[place.expert_id] = tensor
        else:
            setattr(model.get_submodule(module_name), name, nn.Parameter(tensor, requires_grad=False))


def _make_head(model: LolaPreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Give a classification head, which no checkpoint of the base holds, fresh weights."""
    head = getattr(model, "score", None)
    if head is not None:
        head.to_empty(device=device).to(dtype)
        init_weights(head, model.config.initializer_range)


def _make_nf4_modules(model: LolaPreTrainedModel, device: torch.device) -> None:
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
