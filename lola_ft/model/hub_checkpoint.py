"""Reading a checkpoint folder in the Hub's layout, tensor by tensor, and saying what is wrong with it.

Tensors are read with plain reads into memory of their own: a mapped file would count as resident for as long as the
mapping lives, and a file that shrinks under a mapping kills the process.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

from lola_ft.errors import CheckpointError
from lola_ft.model.config import LolaConfig
from lola_ft.model.layout import is_ignored

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000
_PIECE = 1 << 20  # values cast at a time: an embedding in float32 would double the peak of loading
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes lie: `shape` elements of `dtype` from byte `start` of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor into memory of its own, in its own dtype or cast to another, a piece at a time."""
        tensor = torch.empty(self.shape, dtype=dtype or self.dtype)
        flat = tensor.view(-1)
        step = max(1, flat.numel()) if tensor.dtype == self.dtype else _PIECE
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.start)
            for start in range(0, flat.numel(), step):
                target = flat[start : start + step]
                piece = target if target.dtype == self.dtype else torch.empty(target.shape, dtype=self.dtype)
                read_fully(handle.fileno(), bytes_of(piece), self.file)
                if piece is not target:
                    target.copy_(piece)
        return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read into or write from."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_fully(fd: int, view: memoryview, file: Path) -> None:
    """Fill `view` from the file's position on; a short read means that the file shrank."""
    done = 0
    while done < len(view):
        count = os.readv(fd, [view[done:]])
        if count == 0:
            raise CheckpointError(f"{file}: ends too early; it is truncated. Download it again.")
        done += count


@dataclass(frozen=True)
class HubCheckpoint:
    """A checked checkpoint folder: its config and the place of each weight.

    Attributes:
        config_json: The config as the file has it.
        entries: By tensor name.
        files: The safetensors files.
        ignored: Names of legacy buffers and of copies of tied weights, which are left out.
    """

    folder: Path
    config: LolaConfig
    config_json: dict[str, Any]
    entries: dict[str, TensorEntry]
    files: list[Path]
    ignored: list[str]

    @staticmethod
    def open(path: str | Path, revision: str | None = None) -> "HubCheckpoint":
        """Open a folder or a Hub repository (downloaded, or from the cache) and check every weight's shape.

        Raises:
            CheckpointError: Naming file and tensor.
        """
        folder = resolve_folder(path, revision)
        config_json = _read_json(folder / "config.json")
        model_type = config_json.get("model_type")
        if model_type != LolaConfig.model_type:
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is '{model_type}', not '{LolaConfig.model_type}': this is not a "
                "LOLA checkpoint. lola_ft fine-tunes LOLA, for instance dice-research/lola_v1."
            )
        try:
            config = LolaConfig.from_dict(config_json)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}/{error}") from error
        files = weight_files(folder)
        found = {entry.name: entry for file in files for entry in read_header(file)}
        entries = {name: entry for name, entry in found.items() if not is_ignored(name)}
        _check_shapes(folder, entries, expected_shapes(config))
        return HubCheckpoint(folder, config, config_json, entries, files, sorted(set(found) - set(entries)))

    def __iter__(self) -> Iterator[TensorEntry]:
        """The weights in file order, so that reading them is sequential."""
        yield from sorted(self.entries.values(), key=lambda entry: (entry.file, entry.start))


def resolve_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded or found in the cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists():
        raise CheckpointError(f"{text}: is a file; give the checkpoint's folder.")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder. Give a checkpoint's folder or a Hub id like owner/name.")
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_WANTED_FILES)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"{text}: no such folder here, and no such repository on the Hub ({error}).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{text}: not a folder here, and the Hub cannot be reached ({reason}).") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single file or, without one, those of the index (as transformers)."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: its weight_map does not say which shard holds which tensor.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{index}: names shards that are not there: {', '.join(missing) or 'none at all'}.")
        return [folder / name for name in names]
    raise CheckpointError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}. (Pickled .bin weights are never loaded.)")


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, by its header; checks that the file is as long as the header says."""
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
    dtype = _DTYPES.get(info["dtype"])
    if dtype is None and not is_ignored(name):
        raise CheckpointError(f"{file}: tensor '{name}' is {info['dtype']}; weights must be F32, F16 or BF16.")
    shape = tuple(info["shape"])
    if start < 0 or (dtype is not None and end - start != prod(shape) * dtype.itemsize):
        raise CheckpointError(
            f"{file}: tensor '{name}' takes {end - start} bytes, which its shape and dtype contradict."
        )
    return TensorEntry(name, file, dtype or torch.uint8, shape, data_start + start, end - start)


def expected_shapes(config: LolaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config, in the Hub's names and orientation (in×out)."""
    d, f = config.n_embd, config.n_inner
    mlp: dict[str, tuple[int, ...]] = {
        "c_fc.weight": (d, f),
        "c_fc.bias": (f,),
        "c_proj.weight": (f, d),
        "c_proj.bias": (d,),
    }
    attn: dict[str, tuple[int, ...]] = {
        "c_attn.weight": (d, 3 * d),
        "c_attn.bias": (3 * d,),
        "c_proj.weight": (d, d),
        "c_proj.bias": (d,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, d),
        "transformer.wpe.weight": (config.n_positions, d),
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
    }
    for n in range(config.n_layer):
        prefix = f"transformer.h.{n}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}.{norm}.weight": (d,), f"{prefix}.{norm}.bias": (d,)}
        shapes |= {f"{prefix}.attn.{name}": shape for name, shape in attn.items()}
        if config.is_moe_layer(n):
            shapes[f"{prefix}.moe.gate.weight"] = (config.num_experts, d)
            for e in range(config.num_experts):
                shapes |= {f"{prefix}.moe.experts.{e}.{name}": shape for name, shape in mlp.items()}
        else:
            shapes |= {f"{prefix}.mlp.{name}": shape for name, shape in mlp.items()}
    return shapes


def _check_shapes(folder: Path, entries: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights that config.json calls for are missing: {_few(missing)}."
        )
    extra = [name for name in entries if name not in expected]
    if extra:
        raise CheckpointError(f"{folder}: {len(extra)} tensors that config.json does not call for: {_few(extra)}.")
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, but config.json calls for {list(shape)}."
            )


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a checkpoint's folder holds config.json and safetensors files.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, not an object.")
    return content
