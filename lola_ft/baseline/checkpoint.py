"""A dense model's checkpoint folder: its config, and where each weight lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lola_ft.baseline.families import Family, family_in
from lola_ft.checkpoints.base_checkpoint import WEIGHT_KINDS
from lola_ft.checkpoints.folder import resolve_folder, weight_files
from lola_ft.checkpoints.safetensors_file import TensorEntry, read_header
from lola_ft.errors import CheckpointError

BLOOM_POSITIONS = 2048
"""BLOOM has no learned positions; it was trained on sequences of this length."""
MERGED_SHARD = "5GB"
"""Merged weights are written in files of at most this size."""
_LEGACY = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


@dataclass(frozen=True)
class BaseCheckpoint:
    """A folder with a dense model.

    Attributes:
        config: transformers' own, with `n_positions` in every family.
        entries: By tensor name; legacy buffers and the tied head are left out.
    """

    folder: Path
    family: Family
    config: Any
    entries: dict[str, TensorEntry]

    @staticmethod
    def open(path: str | Path, revision: str | None = None) -> "BaseCheckpoint":
        """Open a folder or a Hub repository of a known family.

        Raises:
            CheckpointError: No safetensors files, or damaged ones.
        """
        folder = resolve_folder(path, revision)
        family = family_in(folder)
        assert family is not None, f"{folder} is not of a known family"
        found = {entry.name: entry for file in weight_files(folder) for entry in read_header(file)}
        entries = {name: entry for name, entry in found.items() if not name.endswith(_LEGACY)}
        for name, entry in entries.items():
            if entry.kind not in WEIGHT_KINDS:
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' is {entry.kind}; weights must be F32, F16 or BF16."
                )
        return BaseCheckpoint(folder, family, read_dense_config(folder), entries)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return next(iter(self.entries.values())).dtype


def read_dense_config(folder: Path) -> Any:
    """A dense model's config, with the attributes that ours has.

    Raises:
        CheckpointError: There is none that can be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: no config.json that can be read ({str(error).splitlines()[0]}).") from error
    if not hasattr(config, "n_positions"):
        config.n_positions = BLOOM_POSITIONS
    config.router_aux_loss_coef, config.output_router_logits = 0.0, False
    return config
