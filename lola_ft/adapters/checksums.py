"""Check of an adapter's file, tensor by tensor: all values are finite, and equal to the ones that were written.

Shapes do not show that numbers are in another order (experts fastest or slowest, two layers swapped), and names do not
show that a module was lost with both its factors. So files of lola_ft list their tensors with checksums.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lola_ft.checkpoints.safetensors_file import TensorEntry, bytes_of
from lola_ft.errors import AdapterError

CHECKSUMS_KEY = "lola_ft_tensors"


def checksums_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the CRC-32 of each tensor's bytes, eight hex digits; zeros for meta tensors, which have no numbers."""
    return {
        name: _hex(0 if tensor.is_meta else zlib.crc32(bytes_of(tensor.contiguous()))) for name, tensor in state.items()
    }


def check_contents(file: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Read every tensor once and check it.

    Raises:
        AdapterError: If tensors hold NaN or infinity; or, if the file lists its tensors, if some are missing, added or
            changed. The message names them.
    """
    found = {name: _read(entry) for name, entry in entries.items()}
    if broken := [name for name, (finite, _) in found.items() if not finite]:
        raise AdapterError(f"{file}: {len(broken)} tensors hold NaN or infinite values: {_few(broken)}.")
    if CHECKSUMS_KEY not in metadata:
        return
    try:
        written = dict(json.loads(metadata[CHECKSUMS_KEY]))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{file}: its metadata '{CHECKSUMS_KEY}' are damaged ({error}).") from error
    for problem, names in (
        ("are missing", [name for name in written if name not in found]),
        ("were not in the adapter when it was written", [name for name in found if name not in written]),
        (
            "do not hold the numbers that were written (they changed, or are in another order)",
            [name for name, (_, checksum) in found.items() if written.get(name) != checksum],
        ),
    ):
        if names:
            raise AdapterError(
                f"{file}: {len(names)} tensors {problem}: {_few(names)}. Copy or download the adapter again."
            )


def _read(entry: TensorEntry) -> tuple[bool, str]:
    """Return True if every value is finite, and the CRC-32 of the bytes."""
    finite, checksum = True, 0
    for _, piece in entry.pieces():
        finite = finite and bool(torch.stack(torch.aminmax(piece)).isfinite().all())
        checksum = zlib.crc32(bytes_of(piece), checksum)
    return finite, _hex(checksum)


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
