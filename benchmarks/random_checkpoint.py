"""Random weights: a checkpoint with a family's shapes, and an adapter for it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.families import Place, architecture_of
from lola_ft.model import LolaConfig

SHARD_BYTES = 5_000_000_000
# Keys of other families' configs, by LOLA's keys.
_KEYS = {
    "n_layer": ("num_hidden_layers",),
    "n_embd": ("hidden_size",),
    "n_head": ("num_attention_heads", "num_key_value_heads"),
    "n_inner": ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    "n_positions": ("max_position_embeddings",),
    "num_experts": ("num_experts", "num_local_experts"),
    "topk": ("num_experts_per_tok",),
}


def config_of(family: str, **sizes: Any) -> Any:
    """Return a family's config, with sizes under the names of LOLA's config or its own."""
    if family == "lola":
        return LolaConfig(**sizes)
    config_class = CONFIG_MAPPING[family]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    translated = {name: size for key, size in sizes.items() for name in _KEYS.get(key, (key,)) if name in known}
    if "n_embd" in sizes:
        translated["head_dim"] = sizes["n_embd"] // sizes["n_head"]
    return config_class(**translated)


def write_checkpoint(folder: Path, dtype: torch.dtype, layers: int, family: str = "lola", **sizes: Any) -> None:
    """Write random weights in the Hub's layout, shard by shard.

    Args:
        sizes: Sizes that differ from the defaults of the config class, under the names of LOLA's config or its own.
    """
    config = config_of(family, n_layer=layers, **sizes)
    config.save_pretrained(folder)
    shards: list[list[tuple[str, Place]]] = [[]]
    size = 0
    for name, place in architecture_of(config).places.items():
        num_bytes = torch.Size(place.shape).numel() * dtype.itemsize
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, place))
        size += num_bytes
    weight_map = {}
    pool = torch.randn(1 << 24).mul_(0.02)  # every tensor is a piece of this, from another place on
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = [TensorEntry(name, folder / file, DTYPE_NAMES[dtype], place.shape, 0, 0) for name, place in shard]
        with SafetensorsWriter(folder / file, entries, dtype) as writer:
            for j, (name, place) in enumerate(shard):
                writer.write(_start(name, place, pool, 7919 * (j + 1000 * i)))
                weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _start(name: str, place: Place, pool: Tensor, shift: int) -> Tensor:
    """Return a tensor of an untrained model: normal weights, unit norms, zero biases."""
    if name.endswith(".bias"):
        return torch.zeros(place.shape)
    if place.group == "norms":
        return torch.ones(place.shape)
    numel, first = torch.Size(place.shape).numel(), -shift % pool.numel()
    if first + numel <= pool.numel():  # a view: copying the pool for each of 1,536 experts would take minutes
        return pool[first : first + numel].view(place.shape)
    return pool.roll(shift).repeat(-(-numel // pool.numel()))[:numel].view(place.shape)


def write_random_adapter(folder: Path, base: Path, rank: int) -> None:
    """Write LoRA on attention, dense MLP and every expert with random values, in PEFT's layout."""
    from lola_ft.adapters.on_disk import write_adapter
    from lola_ft.adapters.weights import AdapterWeights, LoraPair

    torch.manual_seed(1)
    weights = AdapterWeights(BaseCheckpoint.open(base).architecture)
    shared: dict[tuple[str, int | None], Tensor] = {}  # gate and up of an expert share one A
    for name, place in weights.architecture.places.items():
        if place.quantized:
            size_out, size_in = place.out_in
            a, b = torch.randn(rank, size_in).mul_(0.02), torch.randn(size_out, rank).mul_(0.02)
            if place.part is not None:
                a = shared.setdefault((place.parameter, place.expert), a)
            weights.pairs[name.removesuffix(".weight")] = LoraPair(a, b, alpha=2.0 * rank)
    write_adapter(weights, folder, "peft")
