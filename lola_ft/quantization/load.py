"""Loading of a base model of any family, dense or in 4 bit, from a folder or the Hub.

The steps: build the model on the meta device (without memory); replace linear layers and experts by their 4-bit forms;
read the shards tensor by tensor, and quantise or cast each tensor into its place.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint, open_config
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.checkpoints.folder import commit_of
from lola_ft.checkpoints.safetensors_file import TensorEntry, Wanted, read_ahead
from lola_ft.console import Console, shown_progress
from lola_ft.errors import CheckpointError, UserError
from lola_ft.families import Architecture, Place
from lola_ft.families.routers import score_in_weight_dtype
from lola_ft.kernels.nf4_sizes import BLOCK
from lola_ft.kernels.precision import DTYPES
from lola_ft.memory import give_back_freed_memory
from lola_ft.model.experts import FusedExperts
from lola_ft.model.layers import init_weights
from lola_ft.model.router import RouterGate
from lola_ft.quantization.audit import audit, require_quantized
from lola_ft.quantization.cache import SOURCE_FILE, is_cache, matching_cache, read_cache, source_identity, write_cache
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear
from lola_ft.quantization.nf4 import NF4

QUANTIZATIONS = ("nf4", None)
CAUSAL_LM = "causal_lm"


def load_base(
    path: str | Path,
    quantization: str | None = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    revision: str | None = None,
    quiet: bool = False,
    head: str = CAUSAL_LM,
    num_labels: int = 2,
) -> Any:
    """Load a base model of any supported family, ready for evaluation or for an adapter.

    With "nf4", attention, dense MLP and every expert become NF4 with double quantisation while loading, one tensor at
    a time; embeddings, norms, biases and router stay in `dtype`.

    Args:
        path: A checkpoint's folder or a Hub id; or the folder of a quantised base that `quantize_base` wrote.
        quantization: "nf4" or None.
        dtype: Dtype of all weights that stay dense, and of the computation.
        device: The device to load to; by default the GPU if there is one.
        revision: Branch, tag or commit on the Hub.
        quiet: Do not print the audit (parameters and bytes by part and format).
        head: "causal_lm"; or, if the family has them, "sequence_classification" or "token_classification": a new
            layer with `num_labels` outputs, which stays in `dtype`.

    Returns:
        The family's model in evaluation mode, with `base_id`, `base_revision`, `base_fingerprint` and
        `quantization`.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit its config, weights are not finite, an output head
            that should equal the embeddings does not, or a weight stayed dense that should be in 4 bit. The message
            names file and tensor.
        UserError: For an unknown quantization, dtype or head.
    """
    quantization, torch_dtype = known_quantization(quantization), known_dtype(dtype)
    target = torch.device(device) if device else default_device()
    if is_cache(path):
        if head != CAUSAL_LM:
            raise UserError(
                f"{path}: is the 4-bit form of a base, which cannot get another head. Give the original base."
            )
        return _load_quantized(Path(path), quantization, torch_dtype, target)
    return load_checkpoint(
        BaseCheckpoint.open(path, revision), path, quantization, torch_dtype, target, quiet, head, num_labels
    )


def load_checkpoint(
    checkpoint: BaseCheckpoint,
    path: str | Path,
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool = False,
    head: str = CAUSAL_LM,
    num_labels: int = 2,
) -> Any:
    """Load a base from an opened checkpoint. Other arguments and errors are those of `load_base`.

    Args:
        path: The base's folder or Hub id, as the user gave it.
    """
    quantization = known_quantization(quantization)
    checkpoint.check_tied_head()
    base_fingerprint = fingerprint(checkpoint)
    architecture = checkpoint.architecture
    if head != CAUSAL_LM:
        architecture.config.num_labels = num_labels
    model = _build(architecture, head, quantization, dtype, device)
    cached = quantization and matching_cache(source_identity(checkpoint, base_fingerprint, dtype))
    if cached:
        read_cache(model, cached, device)
    else:
        _stream(model, checkpoint, dtype, device)
    _finish(model, checkpoint.folder, dtype, device)
    model.config._name_or_path = str(path)
    model.base_id = "" if Path(path).exists() else str(path)  # a local path means nothing on other machines
    model.base_revision = commit_of(path, checkpoint.folder)
    model.base_fingerprint = base_fingerprint
    if not quiet:
        title = f"{path}, {'NF4 with double quantisation' if quantization else 'not quantised'}, on {device}"
        Console().print(audit(model).table(title))
    return model


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantize_base(
    path: str | Path, dtype: str | torch.dtype = "bfloat16", revision: str | None = None, quiet: bool = False
) -> Path:
    """Quantise a base once, and return the folder in the cache with the result, where `load_base` finds it.

    Raises:
        CheckpointError: For the errors of `load_base`, or if the cache cannot be written. Nothing partial is left.
    """
    torch_dtype = known_dtype(dtype)
    checkpoint = BaseCheckpoint.open(path, revision)
    model = load_checkpoint(checkpoint, path, "nf4", torch_dtype, torch.device("cpu"), quiet)
    identity = source_identity(checkpoint, model.base_fingerprint, torch_dtype)
    return matching_cache(identity) or write_cache(model, identity, checkpoint.folder)


def known_quantization(quantization: str | None) -> str | None:
    """Return a quantization by its name; "none" is None.

    Raises:
        UserError: If the name is unknown.
    """
    wanted = None if quantization == "none" else quantization
    if wanted not in QUANTIZATIONS:
        raise UserError(f"quantization '{wanted}' is not known; use 'nf4' or None.")
    return wanted


def known_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype by its name.

    Raises:
        UserError: If the name is unknown, or the dtype cannot hold weights.
    """
    known = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if known is None or known not in DTYPES.values():
        raise UserError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}.")
    return known


def require_finite(tensor: Tensor, what: str) -> None:
    """Check that all values of a weight are finite. In 4 bit, NaN or infinity would spoil a whole block, unnoticed.

    Args:
        what: Beginning of the message, such as file and tensor.

    Raises:
        CheckpointError: If a value is NaN or infinite.
    """
    extremes = torch.stack(torch.aminmax(tensor))  # NaN if any value is
    if not torch.isfinite(extremes).all():
        raise CheckpointError(f"{what} holds NaN or infinite values. The file is damaged, or its training diverged.")


def _load_quantized(folder: Path, quantization: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a base from a folder that `quantize_base` wrote, without its source."""
    if quantization is None:
        raise UserError(f"{folder}: holds a base in 4 bit; load it with quantization='nf4'.")
    architecture = open_config(folder)[1]
    model = _build(architecture, CAUSAL_LM, quantization, dtype, device)
    read_cache(model, folder, device)
    exact = {place.parameter for place in architecture.places.values() if place.float32}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in exact:
            parameter.data = parameter.data.to(dtype)
    _finish(model, folder, dtype, device)
    model.base_id = ""
    model.base_fingerprint = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["fingerprint"]
    return model


def _build(
    architecture: Architecture, head: str, quantization: str | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """Build a model on the meta device, with the 4-bit forms of the modules that 4-bit loading quantises."""
    with init_empty_weights(include_buffers=False):  # rotary tables, for example, are in no file
        model = architecture.family.model_class(head)(architecture.config)
    for name, module in [item for item in model.named_modules() if isinstance(item[1], Conv1D)]:
        _replace(model, name, _linear_like(module))
    for place in architecture.places.values():
        if place.expert is not None:
            _take_over_experts(model, place.module, architecture.sizes.activation)
        elif place.group == "router" and not architecture.family.native:
            _score_exactly(model.get_submodule(place.module))
        elif place.correction:
            _as_buffer(model.get_submodule(place.module), place.leaf)
        if quantization and place.quantized:
            _quantize_module(model, place, device)
    model.quantization = quantization
    model.config.dtype = dtype
    return model


def _score_exactly(router: nn.Module) -> None:
    """Make a router of transformers score in its weight's dtype (a linear one in float32), also under autocast."""
    if isinstance(router, nn.Linear):
        router.__class__ = RouterGate
    else:
        score_in_weight_dtype(router)


def _as_buffer(module: nn.Module, name: str) -> None:
    """Turn a parameter into a buffer, so that nothing trains it."""
    tensor = getattr(module, name).data
    delattr(module, name)
    module.register_buffer(name, tensor)


def _linear_like(module: Conv1D) -> nn.Linear:
    """Return a linear layer (weight out×in) that replaces transformers' `Conv1D`."""
    with torch.device("meta"):
        size_in, size_out = module.weight.shape
        return nn.Linear(size_in, size_out, bias=module.bias is not None)


def _take_over_experts(model: nn.Module, name: str, activation: str) -> None:
    """Replace transformers' experts module by `FusedExperts`, unless that was done."""
    module = model.get_submodule(name)
    if not isinstance(module, FusedExperts):
        with torch.device("meta"):
            _replace(model, name, FusedExperts(**_settings_of(module, activation)))


def _settings_of(module: Any, activation: str) -> dict[str, Any]:
    """Return the arguments of `FusedExperts` that describe transformers' experts module."""
    plain = module.is_concatenated and not module.has_post_expert_norm
    assert plain, f"{type(module).__name__}: gate and up are interleaved, or a norm follows; the kernels have neither"
    num_experts, *rest = module.down_proj.shape
    inner, hidden = rest if module.is_transposed else rest[::-1]
    return {
        "hidden_size": hidden,
        "inner_size": inner,
        "num_experts": num_experts,
        "has_gate": module.has_gate,
        "has_bias": module.has_bias,
        "is_transposed": module.is_transposed,
        "activation": activation,
    }


def _quantize_module(model: nn.Module, place: Place, device: torch.device) -> None:
    """Replace the module that owns a weight by its 4-bit form, unless that was done."""
    module = model.get_submodule(place.module)
    if isinstance(module, NF4Linear | NF4Experts):
        return
    if isinstance(module, FusedExperts):
        with torch.device("meta"):
            experts = NF4Experts(**module.settings)
        experts.allocate(device)
        _replace(model, place.module, experts)
    else:
        assert isinstance(module, nn.Linear), f"{place.module} is a {type(module).__name__}, which has no 4-bit form"
        _replace(model, place.module, NF4Linear(module.in_features, module.out_features, module.bias is not None))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _stream(model: Any, checkpoint: BaseCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Read the checkpoint in file order, quantise or cast each tensor into its place, and free it."""
    places = checkpoint.architecture.places

    def four_bit(place: Place) -> NF4Experts | NF4Linear | None:
        module = model.get_submodule(place.module)
        return module if place.quantized and isinstance(module, NF4Experts | NF4Linear) else None

    # Weights are quantised from the stored values. Casting them first would round twice.
    def read_as(entry: TensorEntry) -> Wanted:
        place = places[entry.name]
        if four_bit(place):
            return Wanted(entry, borrowed=True)
        return Wanted(entry, torch.float32 if place.float32 else dtype)

    wanted = list(map(read_as, checkpoint))
    with shown_progress("Loading", len(wanted), "tensors") as advance:
        for number, (entry, read) in enumerate(read_ahead(wanted)):
            if number % 16 == 0:
                give_back_freed_memory()
            tensor, place, what = read.to(device), places[entry.name], f"{entry.file}: tensor '{entry.name}'"
            quantised = four_bit(place)
            # On a CPU the scales tell, in a sixteenth of the time that looking at the weights takes.
            scales_tell = quantised is not None and device.type == "cpu" and tensor.numel() % BLOCK == 0
            if not scales_tell:
                require_finite(tensor, what)
            nf4 = _put(model, place, tensor, quantised, dtype, device)
            if nf4 is not None and scales_tell:
                require_finite(nf4.offset, what)
            advance(1)


def _put(
    model: Any,
    place: Place,
    tensor: Tensor,
    quantised: NF4Experts | NF4Linear | None,
    dtype: torch.dtype,
    device: torch.device,
) -> NF4 | None:
    """Put a tensor into its place: dense, or quantised into the 4-bit module `quantised`; return what was quantised."""
    # In this order: a 4-bit linear layer, a 4-bit expert, a slice of a dense stack, a correction term, a parameter
    if isinstance(quantised, NF4Linear):
        quantised.load_dense(tensor.t() if place.transposed else tensor)
        return quantised.stored()
    if quantised is not None:
        experts: Any = quantised  # mypy would not believe it: bitsandbytes' classes have no types
        part, expert_id = place.part or place.leaf, place.expert or 0
        experts.load_expert(part, expert_id, tensor)
        return experts.stored(part, expert_id)
    if place.expert is not None:
        _fill_slice(model, place, tensor, dtype, device)
    elif place.correction:
        model.get_submodule(place.module).register_buffer(place.leaf, tensor)
    else:
        weight = tensor.t().contiguous() if place.transposed else tensor
        parameter = nn.Parameter(weight, requires_grad=not model.quantization)
        setattr(model.get_submodule(place.module), place.leaf, parameter)
    return None


def _fill_slice(model: Any, place: Place, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Copy one expert's tensor into its stack (E, …). The first expert's tensor allocates the stack."""
    module = model.get_submodule(place.module)
    stack = getattr(module, place.leaf)
    if stack.is_meta:
        stack = nn.Parameter(torch.empty_like(stack, dtype=dtype, device=device), requires_grad=not model.quantization)
        setattr(module, place.leaf, stack)
    assert place.expert is not None, "only experts are stacked"
    if place.quantized:
        module.load_expert(place.part or place.leaf, place.expert, tensor)
    else:
        stack.data[place.expert] = tensor


def _finish(model: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Initialise a new head, tie the output head, and check that no weight is missing."""
    head = getattr(model, "score", None)
    if head is not None:  # a base's checkpoint has no such head
        head.to_empty(device=device).to(dtype)
        init_weights(head, model.config.initializer_range)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, f"parameters were left without weights: {left[:3]}"
    if model.quantization:
        require_quantized(model)
    model.eval()
