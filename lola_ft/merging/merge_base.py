"""The weights that an adapter is merged into: a checkpoint's stored weights, or their 4-bit rounding."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.checkpoints.safetensors_file import Empty, TensorEntry
from lola_ft.families import Architecture


@dataclass(frozen=True)
class MergeBase(ABC):
    """A base's tensors by Hub names, read piece by piece.

    Attributes:
        folder: Folder of the config, the tokenizer and other small files.
        architecture: Its family, sizes and places.
        config_json: The content of `config.json`.
        shards: The files to write, each with its tensors in order.
        ignored: Names of legacy tensors that are left out.
        fingerprint: Identity of the original weights.
        rounded: True if the tensors are rounded to 4 bit.
        kind: `checkpoint`, or `nf4` if only the 4-bit form exists.
        omitted_prefix: Beginning of the Hub names that is missing in the base's own files, and so in the merged ones.
    """

    folder: Path
    architecture: Architecture
    config_json: dict[str, Any]
    shards: list[tuple[str, list[TensorEntry]]]
    ignored: list[str]
    fingerprint: str
    rounded: bool
    kind: str
    omitted_prefix: str

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors to write, by name."""
        return {entry.name: entry for _, entries in self.shards for entry in entries}

    def is_rounded(self, name: str) -> bool:
        """Return True if 4-bit rounding changes this tensor."""
        return self.rounded and name in self.architecture.places and self.architecture.places[name].quantized

    def stored_name(self, name: str) -> str:
        """Return the name of the tensor that holds a weight in the files to write."""
        return self.architecture.family.in_file(name).removeprefix(self.omitted_prefix)

    @abstractmethod
    def pieces(self, entry: TensorEntry, unit: int = 1, empty: Empty | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the flat tensor in pieces of whole units, as `TensorEntry.pieces` does."""

    @abstractmethod
    def rows(self, entry: TensorEntry, wanted: list[int]) -> Tensor:
        """Read some rows of a 2-D tensor (len(wanted), columns)."""


@dataclass(frozen=True)
class CheckpointBase(MergeBase):
    """A checkpoint in the Hub's layout, with its stored weights or their NF4 rounding."""

    @staticmethod
    def open(checkpoint: BaseCheckpoint, rounding: str) -> "CheckpointBase":
        """Open a base to merge into its stored weights (`base`) or their 4-bit rounding (`nf4`).

        Raises:
            CheckpointError: If the base has an output head that should equal its embeddings and does not.
        """
        checkpoint.check_tied_head()
        entries = checkpoint.copied
        return CheckpointBase(
            folder=checkpoint.folder,
            architecture=checkpoint.architecture,
            config_json=checkpoint.config_json,
            shards=[(file.name, [entry for entry in entries if entry.file == file]) for file in checkpoint.files],
            ignored=checkpoint.ignored,
            fingerprint=fingerprint(checkpoint),
            rounded=rounding == "nf4",
            kind="checkpoint",
            omitted_prefix=checkpoint.omitted_prefix,
        )

    def pieces(self, entry: TensorEntry, unit: int = 1, empty: Empty | None = None) -> Iterator[tuple[int, Tensor]]:
        if self.is_rounded(entry.name):
            yield 0, self._rounded(entry).view(-1)
        else:
            yield from entry.pieces(unit, empty)

    def rows(self, entry: TensorEntry, wanted: list[int]) -> Tensor:
        if self.is_rounded(entry.name):
            return self._rounded(entry)[wanted]
        return torch.cat([entry.rows(row, row + 1).read() for row in wanted])

    def _rounded(self, entry: TensorEntry) -> Tensor:
        # Imported late, so that a merge into the original weights does not import bitsandbytes.
        from lola_ft.merging.rounding import nf4_rounded

        return nf4_rounded(self.architecture.places[entry.name], entry.read())
