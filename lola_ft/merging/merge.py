"""Merging an adapter into the weights on disk: tensor by tensor, in the Hub's layout, whole or not at all."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lola_ft.adapters.files import StoredAdapter, read_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError, UserError
from lola_ft.files import replace_folder, write_text
from lola_ft.merging.rounding import nf4_rounded
from lola_ft.merging.verify import Verification, verify
from lola_ft.model.fingerprint import fingerprint
from lola_ft.model.hub_checkpoint import HubCheckpoint
from lola_ft.model.safetensors_writer import SafetensorsWriter
from lola_ft.quantization.load import DTYPES

ROUNDINGS = ("base", "nf4")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
_OTHER_FILES = ("generation_config.json", "*.py")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        applied: Adapter tensors merged (A, B and trained weights each count one), out of `adapter_tensors`.
        changed: Base tensors that the adapter changed.
        rounded: Base tensors that it did not, but 4-bit rounding did (`rounding="nf4"`).
        copied: Base tensors written as they were (but for a cast).
        dropped: Legacy buffers and copies of tied weights that were left out, by name.
        largest_change: Largest absolute change that the adapter made to any weight, as written.
    """

    base_fingerprint: str
    adapter_layout: str
    dtype: str
    rounding: str
    adapter_tensors: int
    applied: int
    changed: int
    rounded: int
    copied: int
    dropped: list[str]
    largest_change: float
    verification: Verification | None = None


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str = "auto",
    rounding: str = "base",
    revision: str | None = None,
    allow_other_base: bool = False,
    check: bool = True,
) -> MergeReport:
    """Write base plus adapter as a checkpoint in the Hub's layout, with the tokenizer; reload and compare it.

    Args:
        base: The base's folder or Hub id.
        adapter: An adapter's folder, either layout.
        out: Folder to write; must not hold anything yet.
        dtype: Of the merged weights: `auto` (the base's own), float32, bfloat16 or float16.
        rounding: `base` adds the update to the original weights; `nf4` to what they are after 4-bit rounding, which
            is what training saw.
        check: Reload the result and compare its logits with base plus adapter before it is put in place.

    Raises:
        AdapterError: If the adapter does not fit, or would change nothing.
        UserError: If `out` is taken or an option unknown.
    """
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding '{rounding}' is not known; use one of {', '.join(ROUNDINGS)}.")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not known; use auto or one of {', '.join(DTYPES)}.")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"{out}: already there and not empty. Choose another --out, or remove it first.")
    checkpoint = HubCheckpoint.open(base, revision)
    stored = read_adapter(adapter)
    weights = stored.weights(checkpoint.config.num_experts)
    weights.check_against({name: entry.shape for name, entry in checkpoint.entries.items()})
    own = fingerprint(checkpoint)
    if weights.base_fingerprint not in (None, own) and not allow_other_base:
        raise AdapterError(
            f"{adapter} was trained on base {weights.base_fingerprint}; {base} is {own}. Merge it with its own base, "
            "or pass --allow-other-base."
        )
    with replace_folder(out) as folder:
        report = _write_weights(checkpoint, weights, folder, DTYPES.get(dtype), rounding)
        report = replace(report, base_fingerprint=own, adapter_layout=stored.layout, dtype=dtype)
        _write_config(checkpoint, folder, base, dtype)
        _copy_files(checkpoint, stored, folder)
        if check:
            report = replace(report, verification=verify(checkpoint.folder, stored.folder, folder, rounding))
        write_text(folder / "merge_report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def _write_weights(
    checkpoint: HubCheckpoint, weights: AdapterWeights, folder: Path, dtype: torch.dtype | None, rounding: str
) -> MergeReport:
    applied = changed = rounded = total_bytes = 0
    largest = 0.0
    weight_map: dict[str, str] = {}
    for file in checkpoint.files:
        entries = [entry for entry in checkpoint if entry.file == file]
        with SafetensorsWriter(folder / file.name, entries, dtype) as writer:
            for entry in entries:
                stored = entry.read()
                start = nf4_rounded(entry.name, stored) if rounding == "nf4" else stored
                tensor, used = _merged(entry.name, start, weights)
                tensor = tensor.to(dtype or entry.dtype)
                change = (tensor.float() - start.to(tensor.dtype).float()).abs().max().item() if used else 0.0
                writer.write(tensor)
                applied, largest = applied + used, max(largest, change)
                changed, rounded = changed + (change > 0), rounded + (change == 0 and start is not stored)
                weight_map[entry.name] = file.name
            total_bytes += writer.num_bytes
    if applied != weights.tensor_count():
        raise AdapterError(f"{applied} of {weights.tensor_count()} adapter tensors were merged; the rest has no place.")
    if largest == 0:
        raise AdapterError(
            "The adapter changes nothing: its update is all zeros, or too small for the output dtype. Was it trained? "
            "Nothing was written."
        )
    if checkpoint.files[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return MergeReport(
        base_fingerprint="",
        adapter_layout="",
        dtype="",
        rounding=rounding,
        adapter_tensors=weights.tensor_count(),
        applied=applied,
        changed=changed,
        rounded=rounded,
        copied=len(checkpoint.entries) - changed - rounded,
        dropped=checkpoint.ignored,
        largest_change=largest,
    )


def _merged(name: str, tensor: Tensor, weights: AdapterWeights) -> tuple[Tensor, int]:
    """The weight with the adapter, float32 where it changes, and how many adapter tensors went into it."""
    if name in weights.trained:
        return weights.trained[name].float(), 1
    module = name.removesuffix(".weight")
    if module not in weights.pairs or module == name:
        return tensor, 0
    return weights.delta(module).add_(tensor), 2


def _write_config(checkpoint: HubCheckpoint, folder: Path, base: str | Path, dtype: str) -> None:
    """The base's config as it is, but for the dtype and remote code that a Hub base keeps beside itself."""
    config = dict(checkpoint.config_json)
    if dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if "auto_map" in config and not Path(base).exists():
        config["auto_map"] = {
            name: code if "--" in code else f"{base}--{code}" for name, code in config["auto_map"].items()
        }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _copy_files(checkpoint: HubCheckpoint, stored: StoredAdapter, folder: Path) -> None:
    """The tokenizer that training used if it lies beside the adapter, else the base's, never a mix; the small rest."""
    tokenizer = stored.folder if any(stored.folder.glob("tokenizer*")) else checkpoint.folder
    sources = [(checkpoint.folder, _OTHER_FILES), (tokenizer, _TOKENIZER_FILES)]
    for source, patterns in sources:
        for file in sorted(file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)
