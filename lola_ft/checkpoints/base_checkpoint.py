"""A checkpoint folder of any family, opened and checked: the place of each tensor. Errors name file and tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lola_ft.checkpoints.folder import CONFIG_FILE, read_json, resolve_folder, weight_files
from lola_ft.checkpoints.fused_experts import taken_apart
from lola_ft.checkpoints.safetensors_file import TensorEntry, read_header
from lola_ft.errors import CheckpointError
from lola_ft.families import Architecture, Family, find_family

WEIGHT_KINDS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class BaseCheckpoint:
    """A checked checkpoint folder: its architecture and the place of each weight.

    Attributes:
        config_json: The content of `config.json`.
        entries: The weights by Hub name.
        files: The safetensors files.
        ignored: Names of legacy buffers and of copies of tied weights, which are left out.
        set_aside: Tensors of layers that are not loaded but copied by a merge, by name.
        head: A copy of the embeddings under the output head's name, if a file holds one.
        omitted_prefix: Beginning of the Hub names that is missing in this folder's files, because only the backbone was
            saved; "" if nothing is missing.
    """

    folder: Path
    architecture: Architecture
    config_json: dict[str, Any]
    entries: dict[str, TensorEntry]
    files: list[Path]
    ignored: list[str]
    set_aside: dict[str, TensorEntry]
    head: TensorEntry | None
    omitted_prefix: str = ""

    @staticmethod
    def open(path: str | Path, revision: str | None = None) -> "BaseCheckpoint":
        """Open a folder or a Hub repository (downloaded, or from the cache) and check every weight's shape.

        Raises:
            CheckpointError: If a weight is missing, unknown or of another shape. The message names file and tensor.
        """
        # 1. All tensors of the files, under Hub names, with fused experts split
        folder = resolve_folder(path, revision)
        config_json, architecture = open_config(folder)
        files = weight_files(folder)
        found, prefix = _named_as_on_the_hub(_find_tensors(files), architecture.family)
        family, (_, head) = architecture.family, architecture.family.embeddings
        found = {entry.name: entry for entry in taken_apart(found.values(), family)}
        # 2. Sorted into ignored ones (buffers, copies of a tied head), those set aside, and weights
        ignored = {
            name: entry
            for name, entry in found.items()
            if family.is_ignored(name) or (name == head and head not in architecture.places)
        }
        is_set_aside = family.set_aside or (lambda *_: False)
        set_aside = {name: entry for name, entry in found.items() if is_set_aside(name, architecture.config)}
        entries = {name: entry for name, entry in found.items() if name not in ignored and name not in set_aside}
        # 3. The weights must be the ones that the architecture has, with its shapes.
        _check_tensors(folder, entries, architecture, config_json)
        left_out = sorted(ignored)
        return BaseCheckpoint(
            folder, architecture, config_json, entries, files, left_out, set_aside, ignored.get(head), prefix
        )

    @property
    def family(self) -> Family:
        return self.architecture.family

    @property
    def config(self) -> Any:
        return self.architecture.config

    def __iter__(self) -> Iterator[TensorEntry]:
        """Yield the weights in file order, so that reading them is sequential."""
        yield from sorted(self.entries.values(), key=_in_file_order)

    @property
    def copied(self) -> list[TensorEntry]:
        """The weights and the tensors set aside, in file order: the tensors that a merge writes."""
        return sorted([*self.entries.values(), *self.set_aside.values()], key=_in_file_order)

    def stored_name(self, name: str) -> str:
        """Return the name of the tensor that holds a weight in this folder's files."""
        return self.family.in_file(name).removeprefix(self.omitted_prefix)

    def check_tied_head(self) -> None:
        """Check that a stored output head that should be tied to the embeddings equals them; else it would be lost.

        Raises:
            CheckpointError: If the stored head differs in any value.
        """
        if self.head is None:
            return
        embeddings = self.entries[self.family.embeddings[0]]
        same = self.head.shape == embeddings.shape and self.head.kind in WEIGHT_KINDS
        if not same or any(
            not a.equal(b) for (_, a), (_, b) in zip(self.head.pieces(), embeddings.pieces(), strict=True)
        ):
            raise CheckpointError(
                f"{self.head.file}: tensor '{self.head.name}' differs from '{embeddings.name}', but config.json ties "
                f"the output head to the embeddings, as in {self.family.title}. Remove it if it is stale."
            )


def _in_file_order(entry: TensorEntry) -> tuple[Path, int]:
    return entry.file, entry.start


def open_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """Read a folder's config; return the content of the file, and the architecture.

    Raises:
        CheckpointError: If there is no config, its family is not supported, or it cannot be used.
    """
    file = folder / CONFIG_FILE
    config_json = read_json(file)
    family = find_family(config_json.get("model_type"), file, own_code=bool(config_json.get("auto_map")))
    if quantized := config_json.get("quantization_config"):
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{file}: this checkpoint is quantised ({method}), and its weights cannot be quantised again without loss. "
            "Give the original in 16 or 32 bit as the base: it is loaded in 4 bit (base.quantization: nf4)."
        )
    # Imported late: the checks before need no transformers.
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family.model_type].from_dict(dict(config_json))
        architecture = Architecture(family, config)
        assert architecture.sizes.layers > 0, "a model has layers"
        assert architecture.places, "a family lists its tensors"
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{file}: not a config of {family.title} ({reason[-1].strip() if reason else error!r}). Use the config "
            "that belongs to the weights."
        ) from error
    return config_json, architecture


def _find_tensors(files: list[Path]) -> dict[str, TensorEntry]:
    """Return every tensor of the files by name. A tensor that is in two files is an error."""
    found: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in found:
                raise CheckpointError(
                    f"{file}: tensor '{entry.name}' is also in {found[entry.name].file}. Remove one of the two files."
                )
            found[entry.name] = entry
    return found


def _named_as_on_the_hub(found: dict[str, TensorEntry], family: Family) -> tuple[dict[str, TensorEntry], str]:
    """Return the tensors by Hub name, and the beginning of the names that is missing in the files, "" if none."""
    prefix = f"{family.backbone}."
    if any(name.startswith(prefix) for name in found):
        return found, ""
    head = family.embeddings[1]
    if family.embeddings[0].removeprefix(prefix) not in found:
        return found, ""
    renamed = {name if name == head else f"{prefix}{name}": entry for name, entry in found.items()}
    return {name: replace(entry, name=name) for name, entry in renamed.items()}, prefix


def _check_tensors(
    folder: Path, entries: dict[str, TensorEntry], architecture: Architecture, config_json: dict[str, Any]
) -> None:
    expected = architecture.places
    assumed = [key for key in architecture.family.size_keys if key not in config_json]
    hint = f" (config.json lacks {', '.join(assumed)}, so transformers' default was taken.)" if assumed else ""
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights that config.json calls for are missing: {_few(missing)}.{hint}"
        )
    extra = [name for name in entries if name not in expected]
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors that config.json does not call for: {_few(extra)}.{hint}"
        )
    for name, place in expected.items():
        entry = entries[name]
        if entry.kind not in WEIGHT_KINDS:
            raise CheckpointError(f"{entry.file}: tensor '{name}' is {entry.kind}; weights must be F32, F16 or BF16.")
        if entry.shape != place.shape:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, but config.json calls for "
                f"{list(place.shape)}.{hint}"
            )


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
