"""Safetensors files, read tensor by tensor without memory mapping.

Tensors are read with plain reads into their own memory. A mapped file would count as resident memory as long as the
mapping exists, and a file that shrinks under a mapping kills the process.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lola_ft.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_PIECE = 1 << 20  # values read at a time if a tensor is cast; without pieces an embedding would double the peak memory


# A function that returns memory for a number of values of a dtype.
Empty = Callable[[int, torch.dtype], Tensor]


@dataclass(frozen=True)
class TensorEntry:
    """The place of a tensor's bytes: `shape` elements from byte `start` of `file` on.

    Attributes:
        kind: The dtype's name in the file, such as "BF16".
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor into its own memory, in its own dtype or cast to another one, a piece at a time."""
        tensor = torch.empty(self.shape, dtype=dtype or self.dtype)
        if tensor.dtype == self.dtype:
            self.read_into(tensor)
            return tensor
        flat = tensor.view(-1)
        for start, piece in self.pieces():
            flat[start : start + piece.numel()] = piece
        return tensor

    def read_into(self, tensor: Tensor) -> None:
        """Fill a contiguous CPU tensor of this shape and dtype."""
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.start)
            read_fully(handle.fileno(), bytes_of(tensor), self.file)

    def pieces(self, unit: int = 1, empty: Empty | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the flat tensor in pieces of whole units (such as rows), each with the place of its first value.

        Args:
            empty: Function that returns the memory of a piece; by default new memory.
        """
        empty = empty or _fresh
        with self.file.open("rb", buffering=0) as handle:
            if hasattr(os, "posix_fadvise"):  # not available on every system
                os.posix_fadvise(handle.fileno(), self.start, self.num_bytes, os.POSIX_FADV_SEQUENTIAL)
            handle.seek(self.start)
            numel, step = prod(self.shape), max(1, _PIECE // unit) * unit
            for start in range(0, numel, step):
                piece = empty(min(step, numel - start), self.dtype)
                read_fully(handle.fileno(), bytes_of(piece), self.file)
                yield start, piece

    def rows(self, start: int, stop: int) -> "TensorEntry":
        """Return the entry of some rows of this tensor, from `start` to before `stop`."""
        size = self.num_bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + start * size, num_bytes=(stop - start) * size)


def _fresh(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype)


@dataclass(frozen=True)
class Wanted:
    """A tensor to read.

    Attributes:
        dtype: The dtype to cast to; None for the tensor's own.
        borrowed: Read into memory that is used again once the next tensor is asked for. New memory costs more than the
            reading: the system clears each of its pages first. Not together with `dtype`.
    """

    entry: TensorEntry
    dtype: torch.dtype | None = None
    borrowed: bool = False

    def read(self, memory: Tensor) -> Tensor:
        """Read the tensor, into `memory` (uint8) if it is borrowed."""
        if not self.borrowed:
            return self.entry.read(self.dtype)
        tensor = memory[: self.entry.num_bytes].view(self.entry.dtype).view(self.entry.shape)
        self.entry.read_into(tensor)
        return tensor


def read_ahead(wanted: Iterable[Wanted], ahead: int = 1) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Read each tensor while the caller works on the ones before.

    Args:
        ahead: Number of tensors that are read ahead, and held besides the yielded one.
    """
    coming: deque[tuple[Wanted, Tensor, Future[Tensor]]] = deque()
    unused: list[Tensor] = []

    def start(item: Wanted) -> None:
        memory = unused.pop() if item.borrowed and unused else torch.empty(0, dtype=torch.uint8)
        if item.borrowed and memory.numel() < item.entry.num_bytes:
            memory = torch.empty(item.entry.num_bytes, dtype=torch.uint8)
        coming.append((item, memory, pool.submit(item.read, memory)))

    def finish() -> Iterator[tuple[TensorEntry, Tensor]]:
        item, memory, future = coming.popleft()
        yield item.entry, future.result()
        if item.borrowed:
            unused.append(memory)

    with ThreadPoolExecutor(ahead) as pool:
        for item in wanted:
            start(item)
            if len(coming) > ahead:
                yield from finish()
        while coming:
            yield from finish()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, to read into or write from."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_fully(fd: int, view: memoryview, file: Path) -> None:
    """Fill `view` from the file's current position on. A short read, because the file shrank, is an error."""
    done = 0
    while done < len(view):
        count = os.readv(fd, [view[done:]])
        if count == 0:
            raise CheckpointError(f"{file}: ends too early; it is truncated. Download it again.")
        done += count


def read_header(file: Path) -> list[TensorEntry]:
    """List the tensors of a safetensors file from its header, and check that the file's length fits the header.

    A file is 8 bytes with the header's length n (little-endian), n bytes of JSON, and the tensors. The JSON gives each
    tensor's dtype, shape, and first and end byte, counted from byte 8 + n on.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file}: not a whole safetensors file. Download it again.")
        try:
            header = json.loads(handle.read(length))
            entries = [_entry(file, name, info, 8 + length) for name, info in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{file}: its safetensors header is damaged. Download it again.") from error
    end = max((entry.start + entry.num_bytes for entry in entries), default=8 + length)
    if end > size:
        first = min((e for e in entries if e.start + e.num_bytes > size), key=lambda e: e.start)
        raise CheckpointError(
            f"{file}: truncated: tensor '{first.name}' and what follows is cut off ({size} of {end} bytes). "
            "Download it again."
        )
    return entries


def _entry(file: Path, name: str, info: dict[str, Any], data_start: int) -> TensorEntry:
    start, end = info["data_offsets"]
    dtype = DTYPES.get(info["dtype"])
    shape = tuple(info["shape"])
    if start < 0 or (dtype is not None and end - start != prod(shape) * dtype.itemsize):
        raise CheckpointError(
            f"{file}: tensor '{name}' takes {end - start} bytes, which its shape and dtype contradict."
        )
    return TensorEntry(name, file, str(info["dtype"]), shape, data_start + start, end - start)
