"""What an adapter will hold: its tensors in the model and in its file, without numbers."""

from dataclasses import dataclass

import torch

from lola_ft.adapters.files import file_metadata
from lola_ft.adapters.layouts import to_state
from lola_ft.adapters.selection import check_selection
from lola_ft.adapters.settings import AdapterSettings
from lola_ft.adapters.targets import GROUPS, NORM_MODULES
from lola_ft.adapters.weights import EXPERT_MODULE, AdapterWeights, LoraPair, is_out_by_in
from lola_ft.checkpoints.safetensors_writer import file_header
from lola_ft.model.config import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes

_FLOAT = 4


@dataclass(frozen=True)
class AdapterSizes:
    """What is counted of an adapter.

    Attributes:
        held: Bytes that it adds to the model.
        file: Bytes of `adapter_model.safetensors` at the end of a run.
        numels: Numbers of each tensor that is trained.
    """

    held: int
    file: int
    numels: list[int]


def adapter_sizes(config: LolaConfig, settings: AdapterSettings) -> AdapterSizes:
    """Of LOLA's adapter.

    Raises:
        UserError: If the selection of experts does not fit the base.
    """
    outline = adapter_outline(config, settings)
    return AdapterSizes(
        adapter_bytes(outline, config), adapter_file_bytes(outline, config), trained_numels(outline, config)
    )


def adapter_outline(config: LolaConfig, settings: AdapterSettings) -> AdapterWeights:
    """The adapter under the Hub's names, of tensors that have shapes and no values.

    Raises:
        UserError: If the selection of experts does not fit the base.
    """
    moe_layers = [layer for layer in range(config.n_layer) if config.is_moe_layer(layer)]
    selected = dict.fromkeys(moe_layers, tuple(range(config.num_experts)))
    if settings.selection is not None and (settings.expert_rank is not None or settings.tune_biases):
        check_selection(settings.selection, len(moe_layers), config.num_experts)
        selected = dict(zip(moe_layers, settings.selection, strict=True))
    weights = AdapterWeights({}, base_fingerprint="0" * 16, starts_at_rounding_error=settings.init == "loftq")
    for name, shape in expected_shapes(config).items():
        module, _, kind = name.rpartition(".")
        rank = _rank_of(module, settings, selected)
        if rank is not None and kind == "weight":
            weights.pairs[module] = _pair(module, shape, rank, settings)
        if _is_trained(module, kind, settings, selected):
            weights.trained[name] = torch.empty(shape, device="meta")
        elif kind == "bias" and settings.tune_biases:
            weights.base_biases[name] = torch.empty(shape, device="meta")
    return weights


def trained_numels(weights: AdapterWeights, config: LolaConfig) -> list[int]:
    """Sizes of the trained tensors as the model holds them, an MoE layer's experts stacked."""
    state = to_state(weights, "peft", config.num_experts, weights.experts_of(config.num_experts))
    return [tensor.numel() for tensor in state.values()]


def adapter_bytes(weights: AdapterWeights, config: LolaConfig) -> int:
    """What an attached adapter adds to the model: its tensors, and DoRA's lengths of the base's rows (float32)."""
    lengths = sum(pair.magnitude.numel() for pair in weights.pairs.values() if pair.magnitude is not None)
    return _FLOAT * (sum(trained_numels(weights, config)) + lengths)


def adapter_file_bytes(weights: AdapterWeights, config: LolaConfig) -> int:
    """Size of `adapter_model.safetensors` at the end of a run, header included."""
    some = bool(weights.experts_of(config.num_experts))
    layout = "per_expert" if some and not weights.dora else "peft"
    state = to_state(weights, layout, config.num_experts)
    header, num_bytes = file_header(
        [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()],
        file_metadata(weights, layout, config.num_experts, state),
    )
    return len(header) + num_bytes


def _rank_of(module: str, settings: AdapterSettings, selected: dict[int, tuple[int, ...]]) -> int | None:
    expert = EXPERT_MODULE.match(module)
    if expert:
        layer = int(module.split(".")[2])
        return settings.expert_rank if int(expert["expert"]) in selected[layer] else None
    for group, rank in settings.ranks().items():
        if module.endswith(GROUPS[group]):
            return rank
    return None


def _pair(module: str, shape: tuple[int, ...], rank: int, settings: AdapterSettings) -> LoraPair:
    out_features, in_features = shape if is_out_by_in(module) else shape[::-1]
    dora = settings.dora and module.endswith((*GROUPS["attention"], *GROUPS["mlp"])) and ".experts." not in module
    return LoraPair(
        torch.empty(rank, in_features, device="meta"),
        torch.empty(out_features, rank, device="meta"),
        settings.alpha,
        torch.empty(out_features, device="meta") if dora else None,
    )


def _is_trained(module: str, kind: str, settings: AdapterSettings, selected: dict[int, tuple[int, ...]]) -> bool:
    """Whether a module's own weight or bias is trained."""
    if settings.tune_biases and kind == "bias":
        expert = EXPERT_MODULE.match(module)
        return expert is None or int(expert["expert"]) in selected[int(module.split(".")[2])]
    if settings.tune_router and module.endswith(GROUPS["router"]):
        return True
    return settings.tune_norms and module.rpartition(".")[2] in NORM_MODULES
