"""A short identity of a base model's weights, to tell whether an adapter was trained on this base."""

import hashlib
import json
import os
from typing import Protocol

import torch
from torch import Tensor

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
    digest = hashlib.sha256()
    for entry in sorted(checkpoint.entries.values(), key=lambda entry: entry.name):
        digest.update(json.dumps([entry.name, entry.shape]).encode())
        digest.update(_sample(entry).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(entry: TensorEntry) -> Tensor:
    """Up to 64 values at even distances, in bfloat16."""
    size = entry.dtype.itemsize
    numel = entry.num_bytes // size
    places = [numel * i // min(_SAMPLES, numel) for i in range(min(_SAMPLES, numel))]
    with entry.file.open("rb", buffering=0) as handle:
        raw = bytearray().join(os.pread(handle.fileno(), size, entry.start + place * size) for place in places)
    return torch.frombuffer(raw, dtype=entry.dtype).to(torch.bfloat16)
