"""A quantised base on disk, so that a base is quantised only once.

`lola-ft quantize BASE` writes it. `load_base` uses it if it matches its source, else it quantises again. A cache is a
folder with `nf4.safetensors` (packed codes, scales and dense weights, by their names in memory), `source.json` (format,
fingerprint and files of the source), and copies of the source's config and tokenizer. It can be loaded, and merged
into, without its source.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import TOKENIZER_FILES
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry, Wanted, read_ahead, read_header
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.console import shown_progress
from lola_ft.errors import CheckpointError, WriteError
from lola_ft.families import architecture_of
from lola_ft.files import cache_root, copy_files, replace_folder
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.linear import NF4Linear
from lola_ft.quantization.nf4 import NF4

FORMAT = 2
NF4_PARTS = ("packed", "absmax", "absmax2", "offset")
WEIGHTS_FILE, SOURCE_FILE = "nf4.safetensors", "source.json"
_COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def cache_folder(identity: dict[str, Any]) -> Path:
    """Return the folder for the quantised form of a source."""
    return cache_root() / "nf4" / f"{identity['fingerprint']}-{identity['dtype']}"


def source_identity(checkpoint: BaseCheckpoint, base_fingerprint: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the facts that a cache must match: format, fingerprint, and each weight file's name, size and mtime.

    A Hub snapshot's folder is named after its revision.
    """
    identity = {
        "format": FORMAT,
        "source": checkpoint.folder.name,
        "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": base_fingerprint,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files],
    }
    return identity | ({"set_aside": sorted(checkpoint.set_aside)} if checkpoint.set_aside else {})


def write_cache(model: nn.Module, identity: dict[str, Any], source: Path) -> Path:
    """Save a quantised model as a whole or not at all, and return the folder.

    Args:
        identity: `source_identity` of the model's source.
        source: Folder of the source, whose config and tokenizer are copied.

    Raises:
        CheckpointError: If space or permission is missing.
    """
    folder = cache_folder(identity)
    parts = list(_stored_parts(model))
    target = folder / WEIGHTS_FILE
    entries = [
        TensorEntry(name, target, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, 0) for name, tensor in parts
    ]
    try:
        with replace_folder(folder) as partial:
            with SafetensorsWriter(partial / WEIGHTS_FILE, entries, None) as writer:
                for _, tensor in parts:
                    writer.write(tensor.detach().cpu())
            (partial / SOURCE_FILE).write_text(json.dumps(identity, indent=2) + "\n")
            copy_files(source, partial, _COMPANIONS)
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror or error
        raise CheckpointError(f"{folder}: the quantised base cannot be saved ({reason}).") from error
    return folder


def matching_cache(identity: dict[str, Any]) -> Path | None:
    """Return the folder of the cache that matches this identity in all facts; None if there is none."""
    folder = cache_folder(identity)
    try:
        saved = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if saved == identity else None


def is_cache(folder: str | Path) -> bool:
    """Return True if a folder is a quantised base that `write_cache` wrote."""
    return all((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, SOURCE_FILE))


def caches_of(base_fingerprint: str) -> list[Path]:
    """List the caches of a base on this machine, also if the base itself no longer exists."""
    return [folder for folder in sorted((cache_root() / "nf4").glob(f"{base_fingerprint}-*")) if is_cache(folder)]


def read_cache(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Fill a model of empty NF4 modules from a cache, tensor by tensor.

    Raises:
        CheckpointError: If the file is damaged.
    """
    linear_parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    entries = sorted(read_header(folder / WEIGHTS_FILE), key=lambda entry: entry.start)
    with shown_progress("Loading", sum(entry.num_bytes for entry in entries)) as advance:
        for entry, read in read_ahead(map(Wanted, entries), ahead=2):
            module_name, _, name = entry.name.rpartition(".")
            module = model.get_submodule(module_name)
            tensor = read.to(device)
            if isinstance(module, NF4Linear) and name != "bias":
                linear_parts[module_name][name] = tensor
            elif name in dict(module.named_buffers(recurse=False)):
                setattr(module, name, tensor)
            else:
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            advance(entry.num_bytes)
    for module_name, parts in linear_parts.items():
        module = model.get_submodule(module_name)
        assert isinstance(module, NF4Linear), f"{module_name} is not a 4-bit layer"
        module.load_quantized(NF4(*(parts[name] for name in NF4_PARTS)))


def _stored_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a cache by name: parameters (tied ones once) and the scales of 4-bit weights."""
    seen: set[int] = set()
    places = architecture_of(model.config).places.values()
    corrections = {place.parameter for place in places if place.correction}
    for module_name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            if module.bias is not None:
                yield f"{module_name}.bias", module.bias.data
            for name in NF4_PARTS:
                yield f"{module_name}.{name}", getattr(module.stored(), name)
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{module_name}.{name}", tensor.data
        scales = isinstance(module, NF4Experts)
        for name, tensor in module.named_buffers(recurse=False):
            if (scales and name != "absmax_code") or f"{module_name}.{name}" in corrections:
                yield f"{module_name}.{name}", tensor
