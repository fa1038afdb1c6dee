"""A base with further embedding rows, for an adapter with tokens for which the base has no row."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lola_ft.checkpoints.safetensors_file import Empty, TensorEntry
from lola_ft.merging.merge_base import MergeBase


@dataclass(frozen=True)
class GrownBase(MergeBase):
    """A base with more rows of embeddings, and of the output head if it is not tied. The adapter has all new rows.

    Attributes:
        base: The base without the new rows.
    """

    base: MergeBase

    @staticmethod
    def grow(base: MergeBase, vocabulary: int) -> MergeBase:
        """Return the base with a vocabulary of this number of rows; itself if it has this number."""
        if vocabulary <= base.architecture.sizes.vocab:
            return base
        embeddings = base.architecture.family.embeddings

        def grown(entry: TensorEntry) -> TensorEntry:
            return replace(entry, shape=(vocabulary, *entry.shape[1:])) if entry.name in embeddings else entry

        return GrownBase(
            folder=base.folder,
            architecture=base.architecture.with_vocabulary(vocabulary),
            config_json=base.config_json | {"vocab_size": vocabulary},
            shards=[(file, [grown(entry) for entry in entries]) for file, entries in base.shards],
            ignored=base.ignored,
            fingerprint=base.fingerprint,
            rounded=base.rounded,
            kind=base.kind,
            omitted_prefix=base.omitted_prefix,
            base=base,
        )

    def pieces(self, entry: TensorEntry, unit: int = 1, empty: Empty | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the base's pieces, then zeros for the new rows, which the adapter's rows replace."""
        own = self.base.entries[entry.name]
        yield from self.base.pieces(own, unit, empty)
        held, wanted = (torch.Size(shape).numel() for shape in (own.shape, entry.shape))
        if wanted > held:
            yield held, torch.zeros(wanted - held, dtype=own.dtype)

    def rows(self, entry: TensorEntry, wanted: list[int]) -> Tensor:
        own = self.base.entries[entry.name]
        held = [row for row in wanted if row < own.shape[0]]
        found = self.base.rows(own, held) if held else torch.empty(0, *own.shape[1:], dtype=own.dtype)
        places = {row: place for place, row in enumerate(held)}
        new = torch.zeros(own.shape[1:], dtype=own.dtype)
        return torch.stack([found[places[row]] if row in places else new for row in wanted])
