"""A base whose 4-bit form is the only one available. Its weights are dequantised for the merge."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, Empty, TensorEntry, read_header
from lola_ft.errors import CheckpointError
from lola_ft.families import Architecture
from lola_ft.merging.merge_base import MergeBase
from lola_ft.quantization.cache import NF4_PARTS, SOURCE_FILE, WEIGHTS_FILE
from lola_ft.quantization.nf4 import NF4, dequantize, dynamic_code

_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class QuantizedBase(MergeBase):
    """A folder that `lola-ft quantize` wrote, read by Hub names.

    Attributes:
        stored: The file's tensors, by their names in memory.
    """

    stored: dict[str, TensorEntry]

    @staticmethod
    def open(folder: Path) -> "QuantizedBase":
        """Open a quantised base.

        Raises:
            CheckpointError: If a file of it is missing or damaged.
        """
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: this quantised base has no config.json; an older lola_ft wrote it. Quantise the base again "
                "with `lola-ft quantize`."
            )
        try:
            source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
            fingerprint, dtype = source["fingerprint"], getattr(torch, source["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: not a complete quantised base ({error}). Quantise the base again."
            ) from error
        if set_aside := source.get("set_aside"):
            raise CheckpointError(
                f"{folder}: this 4-bit form of the base lacks {len(set_aside)} tensors that no model loads, such as "
                f"'{set_aside[0]}', but that a merge has to copy. Give the original base with --base."
            )
        config_json, architecture = open_config(folder)
        base = QuantizedBase(
            folder=folder,
            architecture=architecture,
            config_json=config_json,
            shards=_shards(architecture, folder / WEIGHTS_FILE, dtype),
            ignored=[],
            fingerprint=fingerprint,
            rounded=True,
            kind="nf4",
            omitted_prefix="",
            stored={entry.name: entry for entry in read_header(folder / WEIGHTS_FILE)},
        )
        missing = [part for name in base.entries for part in base.parts_of(name) if part not in base.stored]
        if missing:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: tensor '{missing[0]}' is missing. Quantise the base again."
            )
        return base

    def parts_of(self, name: str) -> list[str]:
        """List the stored tensors that make up a weight of the checkpoint."""
        place = self.architecture.places[name]
        if not place.quantized:
            return [place.parameter]
        if place.expert is not None:
            return [place.parameter, *(f"{place.parameter}_{part}" for part in NF4_PARTS[1:])]
        return [f"{place.module}.{part}" for part in NF4_PARTS]

    def pieces(self, entry: TensorEntry, unit: int = 1, empty: Empty | None = None) -> Iterator[tuple[int, Tensor]]:
        if self.architecture.places[entry.name].quantized:
            yield 0, self._dequantized(entry).view(-1)
        else:
            yield from self._dense(entry).pieces(unit, empty)

    def rows(self, entry: TensorEntry, wanted: list[int]) -> Tensor:
        quantized = self.architecture.places[entry.name].quantized
        return (self._dequantized(entry) if quantized else self._dense(entry).read().view(entry.shape))[wanted]

    def _dense(self, entry: TensorEntry) -> TensorEntry:
        """Return the stored tensor of a weight that stayed dense. An expert's bias is a row of its layer's stack."""
        place = self.architecture.places[entry.name]
        stored = self.stored[place.parameter]
        return stored if place.expert is None else stored.rows(place.expert, place.expert + 1)

    def _dequantized(self, entry: TensorEntry) -> Tensor:
        """Dequantise a weight, in the orientation of the checkpoint, float32."""
        # Codes and scales of this weight: of an expert, one row of each stack
        place = self.architecture.places[entry.name]
        parts = [self.stored[part] for part in self.parts_of(entry.name)]
        if place.expert is not None:
            parts = [part.rows(place.expert, place.expert + 1) for part in parts]
        tensors = [part.read() for part in parts]
        if place.part is not None:  # gate or up, in that order
            tensors = [tensor[0, ("gate_proj", "up_proj").index(place.part)] for tensor in tensors]
        # Linear layers were quantised as out×in, so a weight stored in×out is dequantised in that shape and turned.
        packed, absmax, absmax2, offset = (tensor.reshape(-1) for tensor in tensors)
        rows, columns = entry.shape
        shape = (columns, rows) if place.transposed else (rows, columns)
        weight = dequantize(NF4(packed, absmax, absmax2, offset[0]), dynamic_code(), shape, torch.float32)
        return weight.t().contiguous() if place.transposed else weight


def _shards(architecture: Architecture, file: Path, dtype: torch.dtype) -> list[tuple[str, list[TensorEntry]]]:
    """Distribute the tensors to write over files of a few gigabytes."""
    shards: list[list[TensorEntry]] = [[]]
    size, last = 0, ""
    for name, place in architecture.places.items():
        # Experts that share a tensor in the file (`own`) stay in one shard.
        num_bytes = torch.Size(place.shape).numel() * dtype.itemsize
        own = architecture.family.in_file(name)
        if size + num_bytes > _SHARD_BYTES and own != last:
            shards.append([])
            size = 0
        shards[-1].append(TensorEntry(name, file, DTYPE_NAMES[dtype], place.shape, 0, 0))
        size, last = size + num_bytes, own
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, start=1)]
