"""The sizes of a merged model's files: the base's files, with tensors in the base's dtype or a requested one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import CONFIG_FILE, weight_files
from lola_ft.checkpoints.fused_experts import put_together
from lola_ft.checkpoints.safetensors_file import TensorEntry
from lola_ft.checkpoints.safetensors_writer import Outline, file_header
from lola_ft.errors import CheckpointError
from lola_ft.families import Architecture
from lola_ft.file_names import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from lola_ft.kernels.precision import DTYPES


def merged_files(folder: Path, architecture: Architecture, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Return the bytes of each file that `lola-ft merge` will write, including headers.

    Args:
        architecture: The architecture of the merged model.
        folder: The base's folder. Only the headers of its weights are read. If there are no weights, its index and the
            dtype in its config are used; without an index, one file is assumed.
        dtype: Dtype of the merged tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: The base's weights are damaged or do not fit its config.
    """
    sizes = {}
    for file, tensors in _shards(folder, architecture).items():
        header, num_bytes = file_header([(name, shape, dtype or own) for name, shape, own in tensors])
        sizes[file] = len(header) + num_bytes
    return sizes


def _shards(folder: Path, architecture: Architecture) -> dict[str, list[Outline]]:
    """Return each file's tensors, in order."""
    try:
        weight_files(folder)
    except CheckpointError:
        return _planned_shards(folder, architecture)
    checkpoint = BaseCheckpoint.open(folder)
    shards: dict[str, list[Outline]] = {file.name: [] for file in checkpoint.files}
    embeddings, rows = architecture.family.embeddings, architecture.sizes.vocab  # trained tokens may add rows to them
    copied = [
        replace(entry, shape=(rows, *entry.shape[1:])) if entry.name in embeddings else entry
        for entry in checkpoint.copied
    ]
    for entry in put_together(copied, checkpoint.stored_name, architecture.family):
        shards[entry.file.name].append((entry.name, entry.shape, entry.dtype))
    return shards


def _planned_shards(folder: Path, architecture: Architecture) -> dict[str, list[Outline]]:
    """Return each file's tensors from index and config. safetensors sorts tensors of one dtype by name."""
    dtype = _stated_dtype(folder)
    weight_map = _json(folder / WEIGHTS_INDEX_FILE).get("weight_map")
    files: dict[str, str] = weight_map if isinstance(weight_map, dict) else {}
    backbone = f"{architecture.family.backbone}."
    omitted = "" if not files or any(name.startswith(backbone) for name in files) else backbone
    entries = (TensorEntry(name, folder, "F32", place.shape, 0, 0) for name, place in architecture.places.items())
    whole = put_together(entries, architecture.family.in_file, architecture.family)
    shapes = {entry.name.removeprefix(omitted): entry.shape for entry in whole}
    shards: dict[str, list[Outline]] = {}
    for name, shape in sorted(shapes.items()):
        shards.setdefault(files.get(name, WEIGHTS_FILE), []).append((name, shape, dtype))
    return dict(sorted(shards.items()))


def _stated_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that a base's config gives for its weights."""
    stated = _json(folder / CONFIG_FILE)
    return DTYPES.get(str(stated.get("dtype") or stated.get("torch_dtype") or "float32"), torch.float32)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
