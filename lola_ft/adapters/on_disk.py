"""Adapters on disk: reading and writing a folder with `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lola_ft.adapters.checksums import CHECKSUMS_KEY, check_contents, checksums_of
from lola_ft.adapters.layouts import (
    CONFIG_FILE,
    LAYOUTS,
    detect_layout,
    from_state,
    grown_vocabulary,
    to_state,
    token_ids_in,
)
from lola_ft.adapters.shared_inputs import sharing_inputs
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.checkpoints.base_checkpoint import WEIGHT_KINDS
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry, read_header
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.errors import AdapterError, CheckpointError, UserError, in_words
from lola_ft.families import Architecture, Family
from lola_ft.files import replace_folder

WEIGHTS_FILE = "adapter_model.safetensors"
LAYOUT_VERSION = "1"
# The only values that this version supports. With another value of a key, the weights would mean something else.
_PLAIN_CONFIG: dict[str, Any] = {
    "lora_bias": False,
    "layer_replication": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "use_bdlora": None,
}
# Initialisations that subtract the adapter's start from the base's weights.
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT 0.11, which the authors' code runs on, refuses a config with keys that it does not know.
_AUTHORS_CONFIG_KEYS = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r"),
    *("rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder: its config, and the place in the file of each tensor."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def layout(self) -> str:
        return detect_layout(self.entries)

    @property
    def starts_at_rounding_error(self) -> bool:
        """True if the adapter corrects the rounding of the 4-bit base, and so belongs to that base."""
        return self.metadata.get("lola_ft_start") == "loftq"

    @property
    def loads_with_stock_peft(self) -> bool:
        """True if stock PEFT loads the adapter on the unquantised base. PEFT refuses DoRA with LoRA on experts."""
        dora_beside_experts = bool(self.config.get("use_dora") and self.config.get("target_parameters"))
        return self.layout == "peft" and not dora_beside_experts and not self.starts_at_rounding_error

    @property
    def rows(self) -> int:
        """Return the number of embedding rows that the trained tokens need at least; 0 without trained tokens."""
        return max(token_ids_in(self.config), default=-1) + 1

    def vocabulary(self, rows: int) -> int:
        """Return the number of embedding rows with this adapter on a base of `rows` rows.

        It is more than `rows` if the adapter holds every row from there on.
        """
        return grown_vocabulary(token_ids_in(self.config), rows)

    def weights(self, architecture: Architecture) -> AdapterWeights:
        """Read the adapter's weights, by Hub names.

        Args:
            architecture: The base's.

        Raises:
            AdapterError: If a tensor has no place in a base of this architecture.
        """
        return self._arranged({key: entry.read() for key, entry in self.entries.items()}, architecture)

    def outline(self, architecture: Architecture) -> AdapterWeights:
        """Return the weights as meta tensors, with shapes only. Their `keys` are the names in the file."""
        shapes = {
            key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in self.entries.items()
        }
        return self._arranged(shapes, architecture)

    def _arranged(self, state: dict[str, torch.Tensor], architecture: Architecture) -> AdapterWeights:
        try:
            weights = from_state(state, self.config, architecture)
        except AdapterError as error:
            raise AdapterError(f"{self.folder}: {error}") from error
        if "lola_ft_biases" in self.metadata:
            weights.bias_experts = json.loads(self.metadata["lola_ft_biases"])
        weights.base_fingerprint = self.metadata.get("base_fingerprint")
        weights.starts_at_rounding_error = self.starts_at_rounding_error
        if "lola_ft_layout" not in self.metadata:  # files of lola_ft list their tensors, and may leave out layers
            weights.declared = self.config
        weights.keep_experts(json.loads(self.metadata.get("lola_ft_experts", "{}")))
        if bool(weights.token_rows) != bool(weights.token_ids):
            raise AdapterError(f"{self.folder}: {CONFIG_FILE} and the tensors disagree on whether tokens are trained.")
        if weights.dora != bool(self.config.get("use_dora")):
            raise AdapterError(f"{self.folder}: {CONFIG_FILE} and the tensors disagree on whether it uses DoRA.")
        if bool(weights.biases()) != (self.config.get("bias", "none") == "all"):
            raise AdapterError(f"{self.folder}: {CONFIG_FILE} and the tensors disagree on whether biases are trained.")
        return weights


def read_adapter(path: str | Path) -> StoredAdapter:
    """Read an adapter folder of either layout.

    Raises:
        AdapterError: If it is missing or damaged, or holds something that this version would lose.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder}: no adapter here; an adapter's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        entries = {entry.name: entry for entry in read_header(folder / WEIGHTS_FILE)}
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, ValueError, SafetensorError, CheckpointError) as error:
        raise AdapterError(f"{folder}: the adapter is damaged or incomplete ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG_FILE}: holds {in_words(config)}, not an object.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: peft_type is {config.get('peft_type')}; lola_ft reads LoRA adapters.")
    for key, plain in _PLAIN_CONFIG.items():
        if config.get(key, plain) != plain:
            raise AdapterError(f"{folder / CONFIG_FILE}: {key} is {config[key]}, which lola_ft does not support.")
    if config.get("bias", "none") not in ("none", "all"):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: bias is {config['bias']}, which lola_ft does not support; it reads none and all."
        )
    if str(config.get("init_lora_weights")).startswith(_INIT_CHANGES_BASE):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: init_lora_weights is {config['init_lora_weights']}, which changes the base's own "
            "weights; lola_ft does not support it."
        )
    if (version := metadata.get("lola_ft_layout", LAYOUT_VERSION).rpartition("/")[2]) != LAYOUT_VERSION:
        raise AdapterError(f"{folder}: its layout has version {version}; this lola_ft reads {LAYOUT_VERSION}.")
    if odd := [key for key, entry in entries.items() if entry.kind not in WEIGHT_KINDS]:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: tensor '{odd[0]}' is {entries[odd[0]].kind}; must be F32, F16 or BF16."
        )
    check_contents(folder / WEIGHTS_FILE, entries, metadata)
    return StoredAdapter(folder, config, entries, metadata)


def write_adapter(
    weights: AdapterWeights, path: str | Path, layout: str, also: Callable[[Path], None] | None = None
) -> Path:
    """Write an adapter folder as a whole or not at all, and return it. An older adapter there is replaced at the end.

    Args:
        also: Function that writes further files into the folder, before the folder is put in place.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout '{layout}' is not known; use one of {', '.join(LAYOUTS)}.")
    if layout == "per_expert":
        weights.architecture.require({f"layout {layout}": "experts"})
    if not is_replaceable(path):
        raise UserError(f"{path}: exists and holds no adapter. Choose another folder.")
    if layout == "peft":
        weights = sharing_inputs(weights)
    state = to_state(weights, layout)
    metadata = file_metadata(weights, layout, state)
    config = config_for(weights, layout)
    with replace_folder(path) as folder:
        _write_tensors(folder / WEIGHTS_FILE, state, metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if also is not None:
            also(folder)
    return Path(path)


def file_metadata(weights: AdapterWeights, layout: str, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the metadata of an adapter's file.

    Args:
        state: The tensors of the file, in the layout.
    """
    metadata = {"lola_ft_layout": f"{layout}/{LAYOUT_VERSION}", CHECKSUMS_KEY: json.dumps(checksums_of(state))}
    if weights.base_fingerprint:
        metadata["base_fingerprint"] = weights.base_fingerprint
    if weights.starts_at_rounding_error:
        metadata["lola_ft_start"] = "loftq"
    if weights.biases():
        metadata["lola_ft_biases"] = json.dumps(weights.experts_with_biases(), sort_keys=True)
    if layout == "peft" and (experts_of := weights.experts_of()):
        metadata["lola_ft_experts"] = json.dumps(experts_of, sort_keys=True)
    return metadata


def _write_tensors(file: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write an adapter's file so that equal adapters have equal bytes (safetensors orders metadata at random)."""
    entries = [
        TensorEntry(name, file, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, 0) for name, tensor in state.items()
    ]
    with SafetensorsWriter(file, entries, None, metadata) as writer:
        for tensor in state.values():
            writer.write(tensor)


def is_replaceable(path: str | Path) -> bool:
    """Return True if an adapter may be written here: the folder does not exist, is empty, or holds an adapter."""
    folder = Path(path)
    if not folder.is_dir():
        return not folder.exists()
    return (folder / CONFIG_FILE).is_file() or not any(folder.iterdir())


def config_for(weights: AdapterWeights, layout: str) -> dict[str, Any]:
    """Return `adapter_config.json` for the weights: the settings that stock PEFT needs to load them.

    Dropout is written as 0, because it has no effect after training, and PEFT refuses it on expert parameters.
    """
    # Imported late, so that reading an adapter does not import PEFT.
    from peft import LoraConfig

    from lola_ft.adapters.settings import linear_targets, token_modules

    family = weights.architecture.family
    ranks, alphas = ranks_and_alphas(weights, layout)
    common_rank = _preferred(ranks, family)
    common_alpha = _preferred(alphas, family)
    parameters = [target for target in family.parameter_targets if target in ranks]
    parameters += [target for target in ranks if target.endswith(".weight") and target not in parameters]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=weights.base,
        revision=weights.revision,
        inference_mode=True,
        r=int(common_rank),
        lora_alpha=common_alpha if common_alpha % 1 else int(common_alpha),
        rank_pattern={target: rank for target, rank in ranks.items() if rank != common_rank},
        alpha_pattern={target: alpha for target, alpha in alphas.items() if alpha != common_alpha},
        use_rslora=weights.rslora,
        use_dora=weights.dora,
        fan_in_fan_out=_others_hold_in_by_out(weights.architecture, layout),
        target_modules=linear_targets(ranks, family),
        target_parameters=parameters or None,
        modules_to_save=sorted(
            {weights.architecture.trained_module(name) for name in weights.trained if name.endswith(".weight")}
        )
        or None,
        bias="all" if weights.biases() else "none",
        trainable_token_indices={
            module: list(weights.token_ids)
            for module, name in token_modules(weights.architecture).items()
            if name in weights.token_rows
        }
        or None,
    )
    plain = {key: _jsonable(value) for key, value in config.to_dict().items()}
    return plain if layout == "peft" else {key: plain[key] for key in _AUTHORS_CONFIG_KEYS}


def ranks_and_alphas(weights: AdapterWeights, layout: str) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank and alpha of each target. A target is named by its shortest clear ending.

    Raises:
        AdapterError: If modules of one target differ, which neither a config nor a model can express.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, pair in weights.pairs.items():
        target = weights.architecture.family.target_of(module, layout)
        assert target is not None, f"{module} is in no group"
        if (ranks.setdefault(target, pair.rank), alphas.setdefault(target, pair.alpha)) != (pair.rank, pair.alpha):
            raise AdapterError(f"{module}: its rank or alpha differs from that of other '{target}' modules.")
    return ranks, alphas


def _others_hold_in_by_out(architecture: Architecture, layout: str) -> bool:
    """Return True if other tools load the adapter onto a model with linear layers in×out (transformers' `Conv1D`).

    lola_ft's own model classes hold them out×in, the code of LOLA's authors in the orientation of the files.
    """
    if architecture.family.native:
        return layout == "per_expert"
    return any(place.in_by_out for place in architecture.places.values())


def _preferred(values: dict[str, Any], family: Family) -> Any:
    """Return the common value of a pattern: the experts' if there is one, else the first, else 1.

    The experts' value must be the common one, because PEFT allows no pattern for parameters.
    """
    of_experts = (values[target] for target in family.expert_targets if target in values)
    return next(of_experts, next(iter(values.values()), 1))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
