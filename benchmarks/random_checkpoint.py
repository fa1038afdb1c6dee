"""A checkpoint of LOLA's shapes with random weights, and an adapter for it."""

import json
from pathlib import Path

import torch
from torch import Tensor

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig

SHARD_BYTES = 5_000_000_000


def write_checkpoint(folder: Path, dtype: torch.dtype, layers: int, **sizes: int) -> None:
    """Write random weights in the Hub's layout, shard by shard; sizes of the config may be others than LOLA's."""
    config = LolaConfig(n_layer=layers, **sizes)
    config.save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, place in architecture_of(config).places.items():
        shape = place.shape
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    weight_map = {}
    pool = torch.randn(1 << 24).mul_(0.02)  # every tensor is a stretch of these, from a place of its own
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = [TensorEntry(name, folder / file, DTYPE_NAMES[dtype], shape, 0, 0) for name, shape in shard]
        with SafetensorsWriter(folder / file, entries, dtype) as writer:
            for j, (name, shape) in enumerate(shard):
                writer.write(_start(name, shape, pool, 7919 * (j + 1000 * i)))
                weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _start(name: str, shape: tuple[int, ...], pool: Tensor, shift: int) -> Tensor:
    """Normal weights, unit norms, zero biases, as an untrained model has them."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".ln_" in name:
        return torch.ones(shape)
    numel = torch.Size(shape).numel()
    return pool.roll(shift).repeat(-(-numel // pool.numel()))[:numel].view(shape)


def write_random_adapter(folder: Path, base: Path, rank: int) -> None:
    """Write LoRA on attention, dense MLP and every expert with random values, in PEFT's layout."""
    from lola_ft.adapters.on_disk import write_adapter
    from lola_ft.adapters.weights import AdapterWeights, LoraPair

    torch.manual_seed(1)
    weights = AdapterWeights(BaseCheckpoint.open(base).architecture)
    for name, place in weights.architecture.places.items():
        if place.quantized:
            size_out, size_in = place.out_in
            a, b = torch.randn(rank, size_in).mul_(0.02), torch.randn(size_out, rank).mul_(0.02)
            weights.pairs[name.removesuffix(".weight")] = LoraPair(a, b, alpha=2.0 * rank)
    write_adapter(weights, folder, "peft")
