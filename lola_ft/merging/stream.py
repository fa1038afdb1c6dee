"""Writing of merged weights piece by piece (read, add, write), in little memory for a model of any size."""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lola_ft.checkpoints.fused_experts import put_together
from lola_ft.checkpoints.safetensors_file import TensorEntry, bytes_of
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.console import shown_progress
from lola_ft.errors import CheckpointError
from lola_ft.merging.buffers import Buffers
from lola_ft.merging.deltas import Deltas
from lola_ft.merging.merge_base import MergeBase
from lola_ft.merging.pipeline import run_pipeline


@dataclass
class Written:
    """The record of what was written.

    Attributes:
        applied: Number of times that each tensor of the adapter was merged, by module and factor.
        changes: Largest absolute update of each weight that the adapter changes; 0 if the update is smaller than the
            output dtype's rounding.
        weight_map: File of each tensor, by its name in the file.
        num_bytes: Bytes of all tensors.
        checksums: CRC-32 of each tensor's bytes, if they were asked for.
    """

    applied: Counter[str] = field(default_factory=Counter)
    changes: dict[str, float] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    checksums: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """A piece of a tensor that goes to `file`: flat values from place `start` on."""

    file: str
    entry: TensorEntry
    start: int
    values: Tensor


def write_weights(
    base: MergeBase, deltas: Deltas, folder: Path, dtype: torch.dtype | None, checksums: bool = False
) -> Written:
    """Write every tensor of the base, with the adapter's update if it has one.

    Sums are float32 and rounded once.

    Args:
        dtype: Dtype of the merged tensors; None keeps each one's own.
        checksums: Compute checksums of the written bytes, for a later check of the files.
    """
    written = Written()

    buffers = Buffers()
    update = _Update(deltas, written, dtype, buffers)
    values = sum(torch.Size(entry.shape).numel() for entry in base.entries.values())
    with _Sink(base, folder, dtype, checksums) as sink, shown_progress("Merging", values) as advance:

        def store(piece: _Piece) -> None:
            sink.write(piece)
            advance(piece.values.numel())
            buffers.give_back(piece.values)

        run_pipeline(_read(base, buffers), update, store)
    return replace(written, weight_map=sink.weight_map, num_bytes=sink.num_bytes, checksums=sink.sums)


def _read(base: MergeBase, buffers: Buffers) -> Iterator[_Piece]:
    for file, entries in base.shards:
        for entry in entries:
            for start, values in base.pieces(entry, entry.shape[-1], buffers.take):
                yield _Piece(file, entry, start, values)


class _Update:
    """Adds the adapter's update to a piece and casts it."""

    def __init__(self, deltas: Deltas, written: Written, dtype: torch.dtype | None, buffers: Buffers) -> None:
        self._deltas, self._written, self._dtype, self._buffers = deltas, written, dtype, buffers

    def __call__(self, piece: _Piece) -> _Piece:
        # own: the base's values in the output dtype; result: the same with the update, if the adapter has one
        name, values = piece.entry.name, piece.values
        used = self._deltas.tensors_for(name)
        own = self._cast(values, self._dtype or piece.entry.dtype)
        result = self._merged(piece, own) if used else own
        if used and piece.start + values.numel() == torch.Size(piece.entry.shape).numel():
            self._written.applied.update(used)
        for tensor in (values, own):
            if tensor is not result:
                self._buffers.give_back(tensor)
        return replace(piece, values=result)

    def _merged(self, piece: _Piece, own: Tensor) -> Tensor:
        """Return the piece with the update in the output dtype, and record the size of the update.

        Args:
            own: The piece without the update, in the output dtype.
        """
        name = piece.entry.name
        # float32: values + update (or the trained values), then one rounding to the output dtype
        update = self._deltas.update(name, piece.start, piece.values)
        low, high = torch.aminmax(update)
        trained = self._deltas.trained(name, piece.start, piece.values)
        merged = self._buffers.take(own.numel(), own.dtype)
        merged.copy_(update.add_(piece.values) if trained is None else trained)
        if not torch.stack(torch.aminmax(merged)).isfinite().all():
            raise CheckpointError(
                f"{piece.entry.file}: tensor '{name}' is not finite after merging: the base holds NaN or infinity, or "
                f"{own.dtype} is too narrow for the sum. Try --dtype float32."
            )
        # The update counts as no change if rounding swallows all of it.
        change = 0.0 if torch.equal(merged, own) else max(-low.item(), high.item())
        self._written.changes[name] = max(change, self._written.changes.get(name, 0.0))
        return merged

    def _cast(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values if values.dtype == dtype else self._buffers.take(values.numel(), dtype).copy_(values)


class _Sink:
    """Writes pieces to their files, one file after another. A file is synced when the next one starts."""

    def __init__(self, base: MergeBase, folder: Path, dtype: torch.dtype | None, checksums: bool) -> None:
        self._base, self._entries = base, dict(base.shards)
        self._folder, self._dtype, self._checksums = folder, dtype, checksums
        self._file = ""
        self._writer: SafetensorsWriter | None = None
        self.sums: dict[str, int] = {}
        self.weight_map: dict[str, str] = {}
        self.num_bytes = 0

    def write(self, piece: _Piece) -> None:
        if piece.file != self._file:
            self._finish()
            self._file = piece.file
            family = self._base.architecture.family
            named = list(put_together(self._entries[piece.file], self._base.stored_name, family))
            self._writer = SafetensorsWriter(self._folder / piece.file, named, self._dtype)
            self.num_bytes += self._writer.num_bytes
        assert self._writer is not None
        name = piece.entry.name
        self._writer.write_piece(piece.values)
        self.weight_map[self._base.stored_name(name)] = piece.file
        if self._checksums:
            self.sums[name] = zlib.crc32(bytes_of(piece.values), self.sums.get(name, 0))

    def _finish(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*(error or (None, None, None)))
            self._writer = None

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *error: Any) -> None:
        self._finish(*error)
