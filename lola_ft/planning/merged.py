"""The sizes of a merged model's files: as the base's, each tensor in the base's dtype or the one that is asked for."""

import json
from pathlib import Path
from typing import Any

import torch

from lola_ft.checkpoints.folder import weight_files
from lola_ft.checkpoints.safetensors_file import read_header
from lola_ft.checkpoints.safetensors_writer import Outline, file_header
from lola_ft.errors import CheckpointError
from lola_ft.kernels.precision import DTYPES
from lola_ft.model.config import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes
from lola_ft.model.layout import is_ignored

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def merged_files(folder: Path, config: LolaConfig, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of each file that `merge.py` will write, headers included.

    Args:
        folder: The base's; of its weights at most the headers are read. Without them, its index and the dtype in its
            config count; without an index, one file.
        dtype: Of the merged tensors; None keeps each one's own.
    """
    sizes = {}
    for name, tensors in _shards(folder, config).items():
        header, num_bytes = file_header([(key, shape, dtype or own) for key, shape, own in tensors])
        sizes[name] = len(header) + num_bytes
    return sizes


def stated_dtype(folder: Path) -> torch.dtype:
    """What a base's config says that its weights are."""
    stated = _json(folder / "config.json")
    return DTYPES.get(str(stated.get("dtype") or stated.get("torch_dtype") or "float32"), torch.float32)


def _shards(folder: Path, config: LolaConfig) -> dict[str, list[Outline]]:
    """Each file's tensors, in order."""
    try:
        files = weight_files(folder)
    except CheckpointError:
        return _planned_shards(folder, config)
    headers = {file.name: sorted(read_header(file), key=lambda entry: entry.start) for file in files}
    return {
        name: [(entry.name, entry.shape, entry.dtype) for entry in entries if not is_ignored(entry.name)]
        for name, entries in headers.items()
    }


def _planned_shards(folder: Path, config: LolaConfig) -> dict[str, list[Outline]]:
    """By index and config; safetensors puts tensors of one dtype in the order of their names."""
    dtype = stated_dtype(folder)
    places = _json(folder / _INDEX).get("weight_map")
    shards: dict[str, list[Outline]] = {}
    for name, shape in sorted(expected_shapes(config).items()):
        file = places.get(name, _SINGLE) if isinstance(places, dict) else _SINGLE
        shards.setdefault(file, []).append((name, shape, dtype))
    return dict(sorted(shards.items()))


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
