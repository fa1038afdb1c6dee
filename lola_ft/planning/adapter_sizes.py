"""The sizes of an adapter before it exists: its tensors in the model and in its file, as shapes without values."""

from dataclasses import dataclass

import torch

from lola_ft.adapters.layouts import to_state
from lola_ft.adapters.on_disk import file_metadata
from lola_ft.adapters.selection import check_selection
from lola_ft.adapters.settings import AdapterSettings, token_modules
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.checkpoints.safetensors_writer import file_header
from lola_ft.families import Architecture, Place

_FLOAT = 4
_DORA_GROUPS = ("attention", "mlp", "shared_experts")


@dataclass(frozen=True)
class AdapterSizes:
    """The sizes of an adapter.

    Attributes:
        held: Bytes that it adds to the model: its tensors and, for DoRA, the lengths of the base's rows (float32).
        file: Bytes of `adapter_model.safetensors` at the end of a run.
        numels: Number of values of each trained tensor in the model, where the experts of a MoE layer are stacked.
    """

    held: int
    file: int
    numels: list[int]


def adapter_sizes(architecture: Architecture, settings: AdapterSettings) -> AdapterSizes:
    """Count an adapter's tensors.

    Raises:
        UserError: The base lacks a group that the settings train, or the selection of experts does not fit the base.
    """
    outline = adapter_outline(architecture, settings)
    state = to_state(outline, "peft", outline.experts_of())
    numels = [tensor.numel() for key, tensor in state.items() if architecture.group_of(key) != "other"]
    beside = sum(tensor.numel() for tensor in state.values()) - sum(numels)
    lengths = sum(pair.magnitude.numel() for pair in outline.pairs.values() if pair.magnitude is not None)
    return AdapterSizes(_FLOAT * (sum(numels) + beside + lengths), adapter_file_bytes(outline), numels)


def adapter_outline(architecture: Architecture, settings: AdapterSettings) -> AdapterWeights:
    """Return the adapter by Hub names, with meta tensors that have shapes but no values.

    Raises:
        UserError: See `adapter_sizes`.
    """
    architecture.require(settings.wanted())
    chosen, ranks = _chosen(architecture, settings), settings.ranks()
    weights = AdapterWeights(architecture, base_fingerprint="0" * 16)
    weights.starts_at_rounding_error = settings.init == "loftq"
    for name, place in architecture.places.items():
        module, _, kind = name.rpartition(".")
        of_chosen = place.expert is None or place.expert in chosen.get(place.layer, ())
        if kind == "weight" and len(place.shape) == 2 and place.group in ranks and of_chosen:
            weights.pairs[module] = _pair(place, ranks[place.group], settings)
        beside_router = settings.tune_router and place.correction and architecture.is_in_router(place.module)
        if beside_router or (_is_trained(place, kind, settings) and of_chosen):
            weights.trained[name] = torch.empty(place.shape, device="meta")
        elif kind == "bias" and settings.tune_biases:
            weights.base_biases[name] = torch.empty(place.shape, device="meta")
    if settings.token_ids:
        weights.token_ids = settings.token_ids
        names = token_modules(architecture).values()
        weights.token_rows = {
            name: torch.empty(len(settings.token_ids), architecture.sizes.hidden, device="meta") for name in names
        }
    return weights


def adapter_file_bytes(weights: AdapterWeights) -> int:
    """Return the bytes of `adapter_model.safetensors` at the end of a run, including its header."""
    layout = "per_expert" if weights.experts_of() and not weights.dora else "peft"
    state = to_state(weights, layout)
    header, num_bytes = file_header(
        [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()],
        file_metadata(weights, layout, state),
    )
    return len(header) + num_bytes


def _chosen(architecture: Architecture, settings: AdapterSettings) -> dict[int | None, tuple[int, ...]]:
    """Return the ids of the trained experts, by layer."""
    layers, num_experts = architecture.sizes.moe_layers, architecture.num_experts
    if settings.selection is None or (settings.expert_rank is None and not settings.tune_biases):
        return dict.fromkeys(layers, tuple(range(num_experts)))
    check_selection(settings.selection, len(layers), num_experts)
    return dict(zip(layers, settings.selection, strict=True))


def _pair(place: Place, rank: int, settings: AdapterSettings) -> LoraPair:
    size_out, size_in = place.out_in
    dora = settings.dora and place.group in _DORA_GROUPS
    return LoraPair(
        torch.empty(rank, size_in, device="meta"),
        torch.empty(size_out, rank, device="meta"),
        settings.alpha,
        torch.empty(size_out, device="meta") if dora else None,
    )


def _is_trained(place: Place, kind: str, settings: AdapterSettings) -> bool:
    """Tell whether a tensor of the base is fully trained (no LoRA)."""
    if kind == "bias" and settings.tune_biases:
        return True
    return (settings.tune_router and place.group == "router") or (settings.tune_norms and place.group == "norms")
