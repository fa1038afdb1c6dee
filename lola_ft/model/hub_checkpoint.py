"""A checkpoint folder in the Hub's layout: which tensors it holds and where, and what is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from lola_ft.errors import CheckpointError
from lola_ft.model.config import LolaConfig
from lola_ft.model.layout import is_ignored
from lola_ft.model.safetensors_file import TensorEntry, read_header
from lola_ft.repo_id import is_repo_id

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
TEMPLATE_FILE = "prompt_template.jinja"
"""The prompt template that training used, beside an adapter or a merged model."""
WEIGHT_KINDS = ("F32", "F16", "BF16")
_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")


@dataclass(frozen=True)
class HubCheckpoint:
    """A checked checkpoint folder: its config and the place of each weight.

    Attributes:
        config_json: The config as the file has it.
        entries: By tensor name.
        files: The safetensors files.
        ignored: Names of legacy buffers and of copies of tied weights, which are left out.
        head: A copy of the embeddings under the output head's name, if a file holds one.
    """

    folder: Path
    config: LolaConfig
    config_json: dict[str, Any]
    entries: dict[str, TensorEntry]
    files: list[Path]
    ignored: list[str]
    head: TensorEntry | None

    @staticmethod
    def open(path: str | Path, revision: str | None = None) -> "HubCheckpoint":
        """Open a folder or a Hub repository (downloaded, or from the cache) and check every weight's shape.

        Raises:
            CheckpointError: Naming file and tensor.
        """
        folder = resolve_folder(path, revision)
        config_json, config = open_config(folder)
        files = weight_files(folder)
        found = _find_tensors(files)
        entries = {name: entry for name, entry in found.items() if not is_ignored(name)}
        _check_tensors(folder, entries, expected_shapes(config))
        ignored = {name: entry for name, entry in found.items() if name not in entries}
        return HubCheckpoint(folder, config, config_json, entries, files, sorted(ignored), ignored.get(_HEAD))

    def __iter__(self) -> Iterator[TensorEntry]:
        """The weights in file order, so that reading them is sequential."""
        yield from sorted(self.entries.values(), key=lambda entry: (entry.file, entry.start))

    def check_tied_head(self) -> None:
        """Refuse a checkpoint whose output head is not its embeddings: LOLA ties them, so the head would be lost.

        Raises:
            CheckpointError: If the stored head differs in any value.
        """
        embeddings = self.entries["transformer.wte.weight"]
        if self.head is None:
            return
        same = self.head.shape == embeddings.shape and self.head.kind in WEIGHT_KINDS
        if not same or any(
            not a.equal(b) for (_, a), (_, b) in zip(self.head.pieces(), embeddings.pieces(), strict=True)
        ):
            raise CheckpointError(
                f"{self.head.file}: tensor '{_HEAD}' differs from '{embeddings.name}', but LOLA's output head is its "
                "embeddings. Remove it if it is stale; an untied head is not supported."
            )


def resolve_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded or found in the cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists():
        raise CheckpointError(f"{text}: is a file; give the checkpoint's folder.")
    if not is_repo_id(text):
        raise CheckpointError(f"{text}: no such folder. Give a checkpoint's folder or a Hub id like owner/name.")
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_WANTED_FILES)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"{text}: no such folder here, and no such repository on the Hub ({error}).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{text}: not a folder here, and the Hub cannot be reached ({reason}).") from error


def open_config(folder: Path) -> tuple[dict[str, Any], LolaConfig]:
    """A folder's config, as the file has it and checked.

    Raises:
        CheckpointError: There is none, or it is not a LOLA's.
    """
    config_json = _read_json(folder / "config.json")
    model_type = config_json.get("model_type")
    if model_type != LolaConfig.model_type:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is '{model_type}', not '{LolaConfig.model_type}': this is not a "
            "LOLA checkpoint. lola_ft fine-tunes LOLA, for instance dice-research/lola_v1, and, to compare with it, "
            "dense models of type gpt2 and bloom."
        )
    try:
        return config_json, LolaConfig.from_dict(config_json)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error


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


def _find_tensors(files: list[Path]) -> dict[str, TensorEntry]:
    """Every tensor of the files; one that stands in two of them is refused."""
    found: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in found:
                raise CheckpointError(
                    f"{file}: tensor '{entry.name}' is also in {found[entry.name].file}; which counts?"
                )
            found[entry.name] = entry
    return found


def _check_tensors(folder: Path, entries: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]]) -> None:
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
        if entry.kind not in WEIGHT_KINDS:
            raise CheckpointError(f"{entry.file}: tensor '{name}' is {entry.kind}; weights must be F32, F16 or BF16.")
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
