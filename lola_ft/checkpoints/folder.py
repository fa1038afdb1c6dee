"""A checkpoint's folder, local or from the Hub, and the names of its files."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from lola_ft.errors import CheckpointError, NoCheckpointError, first_line, in_words
from lola_ft.file_names import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from lola_ft.files import missing
from lola_ft.repo_id import is_commit, is_repo_id

CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
GENERATION_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FILE = "prompt_template.jinja"
"""File with the prompt template that training used, in the folder of an adapter or a merged model."""

TERMS_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Licence texts, which go with the weights and with models made from them."""

# Model card and licence texts are included, because a merge and a publication pass them on.
_WANTED_FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.md",
    *TERMS_FILES,
)
_TEXT_FILES = ("*.json", "*.txt", "*.model")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth")


def resolve_folder(path: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint; a Hub id is downloaded or found in the cache.

    Raises:
        NoCheckpointError: If there is no such folder and no such repository.
        CheckpointError: If the path is a file.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists():
        raise CheckpointError(f"{text}: is a file; give the checkpoint's folder.")
    if "://" in text:
        raise NoCheckpointError(f"{text}: is a web address. Give a folder, or the base's Hub id like owner/name.")
    if not is_repo_id(text):
        raise NoCheckpointError(f"{missing(text, 'folder')} Give a checkpoint's folder or a Hub id like owner/name.")
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_WANTED_FILES)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NoCheckpointError(
            f"{text}: no such folder in {Path.cwd()}, and no such repository on the Hub ({first_line(error)})."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NoCheckpointError(
            f"{text}: not a folder in {Path.cwd()}, and the Hub cannot be reached ({first_line(error)})."
        ) from error


def commit_of(path: str | Path, folder: Path) -> str | None:
    """Return the commit of a base on the Hub, from its folder in the cache; None for a local folder.

    The Hub's cache names a snapshot's folder after its commit.
    """
    return folder.name if not Path(path).exists() and is_commit(folder.name) else None


def text_folder(model: str, revision: str) -> Path:
    """Return a folder with a base's config and tokenizer, without downloading the weights of a base on the Hub.

    Raises:
        CheckpointError: If there is no such base.
    """
    if Path(model).exists() or not is_repo_id(model):
        return resolve_folder(model, revision)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_TEXT_FILES)))
    except Exception as error:  # the network may raise anything
        raise NoCheckpointError(
            f"{model}: not a folder in {Path.cwd()}, and not found on the Hub ({first_line(error)})."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files: the single file or, if there is none, the shards of the index.

    Raises:
        CheckpointError: If there are no files, or a shard is missing.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / WEIGHTS_INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: its weight_map does not say which shard holds which tensor.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if not names:
            raise CheckpointError(f"{index}: its weight_map names no shard. Download the checkpoint again.")
        if missing:
            raise CheckpointError(
                f"{index}: names shards that do not exist: {', '.join(missing)}. Download the checkpoint again."
            )
        return [folder / name for name in names]
    pickles = sorted(file.name for pattern in _PICKLED_WEIGHTS for file in folder.glob(pattern))
    found = f", but {', '.join(pickles[:3])}{', …' if len(pickles) > 3 else ''}" if pickles else ""
    raise CheckpointError(
        f"{folder}: holds neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}{found}. Pickled weights are never loaded: "
        "opening them can run any code. Use a revision with safetensors; or, if you trust the source, let transformers"
        " write them: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint's folder.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a checkpoint's folder holds config.json and safetensors files.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {in_words(content)}, not an object.")
    return content
