"""A short identity of a base model's weights, to tell whether an adapter was trained on this base."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from lola_ft.model.config import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes
from lola_ft.model.layout import place_of
from lola_ft.model.safetensors_file import TensorEntry

_SAMPLES = 64


class Checkpoint(Protocol):
    """What has tensors by name."""

    @property
    def entries(self) -> dict[str, TensorEntry]: ...


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sixteen hex digits over every weight's name, shape and 64 values spread over it.

    Values are compared in bfloat16, so that a float32 checkpoint and its bfloat16 copy have the same identity.
    (A float16 copy has another: its values round twice.)
    """
    return _digest((name, entry.shape, _sample(entry)) for name, entry in checkpoint.entries.items())


def fingerprint_in_memory(model: nn.Module) -> str | None:
    """The same of a model that transformers loaded, whose checkpoint is not known.

    Returns:
        None where its values are not those of a file (quantised, float16, resized), or where it is no LOLA.
    """
    if not isinstance(model.config, LolaConfig):
        return None
    parameters = dict(model.named_parameters())
    found: list[tuple[str, tuple[int, ...], Tensor]] = []
    for name, shape in expected_shapes(model.config).items():
        place = place_of(name)
        held = parameters.get(place.parameter)
        if held is None or held.dtype not in (torch.float32, torch.bfloat16) or held.is_meta:
            return None
        weight = held.detach() if place.expert_id is None else held.detach()[place.expert_id]
        weight = weight.t() if place.transposed else weight
        if tuple(weight.shape) != shape:
            return None
        spread = torch.unravel_index(torch.tensor(_places(weight.numel()), device=weight.device), shape)
        found.append((name, shape, weight[spread].to(torch.bfloat16).cpu()))
    return _digest(found)


def _digest(tensors: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Over name, shape and sample of each tensor, by name."""
    digest = hashlib.sha256()
    for name, shape, sample in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, shape]).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _places(numel: int) -> list[int]:
    """Up to 64 places at even distances."""
    count = min(_SAMPLES, numel)
    return [numel * i // count for i in range(count)]


def _sample(entry: TensorEntry) -> Tensor:
    """The values at these places, in bfloat16."""
    size = entry.dtype.itemsize
    places = _places(entry.num_bytes // size)
    with entry.file.open("rb", buffering=0) as handle:
        raw = bytearray().join(os.pread(handle.fileno(), size, entry.start + place * size) for place in places)
    return torch.frombuffer(raw, dtype=entry.dtype).to(torch.bfloat16)
