"""A short identity of a base model's weights, to check that an adapter was trained on this base."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import TensorEntry
from lola_ft.families import FAMILIES, architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 64


def fingerprint(checkpoint: BaseCheckpoint) -> str:
    """Return sixteen hex digits: a hash of every weight's name, shape and 64 values spread over it.

    Values are hashed in bfloat16, so that a float32 checkpoint and its bfloat16 copy have the same fingerprint. A
    float16 copy has another one, because its values are rounded twice.
    """
    return _digest(
        (checkpoint.stored_name(name), entry.shape, _sample(entry)) for name, entry in checkpoint.entries.items()
    )


def fingerprint_in_memory(model: "PreTrainedModel") -> str | None:
    """Return the fingerprint of a model that transformers loaded from an unknown checkpoint.

    Returns:
        None if the values are not those of a file (quantised, float16, resized), or if the class is transformers' own:
        its file may or may not have the backbone's prefix in the names.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.native:
        return None
    parameters = dict(model.named_parameters())
    found: list[tuple[str, tuple[int, ...], Tensor]] = []
    for name, place in architecture_of(model.config).places.items():
        held = parameters.get(place.parameter)
        if held is None or held.dtype not in (torch.float32, torch.bfloat16) or held.is_meta:
            return None
        weight = held.detach() if place.expert is None else held.detach()[place.expert]
        weight = weight.t() if place.transposed else weight
        if tuple(weight.shape) != place.shape:
            return None
        spread = torch.unravel_index(torch.tensor(_spots(weight.numel()), device=weight.device), place.shape)
        found.append((name, place.shape, weight[spread].to(torch.bfloat16).cpu()))
    return _digest(found)


def _digest(tensors: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Hash name, shape and sample of each tensor, by name."""
    digest = hashlib.sha256()
    for name, shape, sample in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, shape]).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _spots(numel: int) -> list[int]:
    """Return up to 64 indices at even distances."""
    count = min(_SAMPLES, numel)
    return [numel * i // count for i in range(count)]


def _sample(entry: TensorEntry) -> Tensor:
    """Read the values at these indices, in bfloat16."""
    size = entry.dtype.itemsize
    spots = _spots(entry.num_bytes // size)
    with entry.file.open("rb", buffering=0) as handle:
        raw = bytearray().join(os.pread(handle.fileno(), size, entry.start + spot * size) for spot in spots)
    return torch.frombuffer(raw, dtype=entry.dtype).to(torch.bfloat16)
