"""The parts of a base that turn text into tokens: its tokenizer, and how long a sequence may be."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lola_ft.errors import CheckpointError
from lola_ft.model.config import LolaConfig
from lola_ft.model.hub_checkpoint import open_config, resolve_folder
from lola_ft.repo_id import is_repo_id

_TEXT_FILES = ("*.json", "*.txt", "*.model")


def text_folder(model: str, revision: str) -> Path:
    """A folder with the base's config and tokenizer; of a base on the Hub the weights are not downloaded.

    Raises:
        CheckpointError: No such base.
    """
    if Path(model).exists() or not is_repo_id(model):
        return resolve_folder(model, revision)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_TEXT_FILES)))
    except Exception as error:  # whatever the network raises
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{model}: not a folder here, and not found on the Hub ({reason}).") from error


def read_config(folder: Path) -> LolaConfig:
    """The base's config.

    Raises:
        CheckpointError: There is none that can be read, or it is not a LOLA's.
    """
    return open_config(folder)[1]


def load_tokenizer(folder: Path, config: LolaConfig) -> PreTrainedTokenizerFast:
    """The base's tokenizer, checked against its vocabulary.

    Raises:
        CheckpointError: If there is none, or it has more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: no tokenizer can be loaded from here ({reason}).") from error
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size}. They do not belong together."
        )
    return tokenizer
