"""A writer of safetensors files, tensor by tensor, without all of a file's tensors in memory."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry, bytes_of

Outline = tuple[str, tuple[int, ...], torch.dtype]
"""A tensor's name, shape and dtype."""


def file_header(tensors: Iterable[Outline], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Return the bytes before a file's tensors, and the number of bytes that follow."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    offset = 0
    for name, shape, dtype in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


class SafetensorsWriter:
    """One file, filled in the order of `entries`. The header comes first, so shapes and dtypes must not change."""

    def __init__(
        self,
        path: Path,
        entries: list[TensorEntry],
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Start the file.

        Args:
            entries: The tensors to come.
            dtype: Dtype of every tensor; None keeps each tensor's own.
            metadata: The file's metadata, in addition to its format.
        """
        tensors = [(entry.name, entry.shape, dtype or entry.dtype) for entry in entries]
        self._pending = tensors[::-1]
        header, self.num_bytes = file_header(tensors, metadata)
        self._written = 0  # values written of the current tensor
        self._handle = path.open("wb", buffering=0)
        self._handle.write(header)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, cast to its dtype."""
        name, shape, _ = self._pending[-1]
        assert tuple(tensor.shape) == tuple(shape), f"{name}: {tuple(tensor.shape)} given, {tuple(shape)} announced"
        self.write_piece(tensor)

    def write_piece(self, values: Tensor) -> None:
        """Write the next values of the current tensor, cast to its dtype."""
        name, shape, dtype = self._pending[-1]
        self._written += values.numel()
        numel = torch.Size(shape).numel()
        assert self._written <= numel, f"{name}: {self._written} values given, {numel} announced"
        if self._written == numel:
            self._pending.pop()
            self._written = 0
        view = bytes_of(values.to(dtype).contiguous())
        while len(view):
            view = view[self._handle.write(view) :]

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert not self._pending, f"{len(self._pending)} announced tensors were not written"
            os.fsync(self._handle.fileno())
        self._handle.close()
