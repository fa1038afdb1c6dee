"""The other files of a merged folder: config, generation config, tokenizer, template."""

import json
from pathlib import Path

from lola_ft.checkpoints.folder import GENERATION_FILE, TEMPLATE_FILE, TERMS_FILES, TOKENIZER_FILES, read_json
from lola_ft.files import copy_files, write_text
from lola_ft.merging.merge_base import MergeBase
from lola_ft.standalone.own_code import config_for

_OTHER_FILES = (GENERATION_FILE, "*.py", *TERMS_FILES)


def write_config(base: MergeBase, folder: Path, origin: str, dtype: str) -> None:
    """Write the base's config with the dtype of the merged weights, for every class that loads them.

    Args:
        origin: The base's Hub id, "" for a folder.
        dtype: Name of the merged weights' dtype.
    """
    config = config_for(base.architecture.family, base.config_json, origin)
    config["torch_dtype"] = dtype  # the name that transformers 4 and 5 read
    if "dtype" in config:  # transformers 5 prefers this one
        config["dtype"] = dtype
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def copy_companions(base_folder: Path, adapter_folder: Path, folder: Path) -> None:
    """Copy the tokenizer, prompt template and other small files.

    The tokenizer is the adapter folder's, as in training, or else the base's, but never a mix of both.
    """
    tokenizer = adapter_folder if any(adapter_folder.glob("tokenizer*")) else base_folder
    copy_files(base_folder, folder, _OTHER_FILES)
    copy_files(tokenizer, folder, TOKENIZER_FILES)
    copy_files(adapter_folder, folder, (TEMPLATE_FILE,))
    stops = adapter_folder / GENERATION_FILE
    if not (folder / GENERATION_FILE).is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        write_text(folder / GENERATION_FILE, json.dumps(ids, indent=2) + "\n")
    if stops.is_file():  # answers end with another token than the base's answers
        config = read_json(folder / GENERATION_FILE) | {"eos_token_id": read_json(stops)["eos_token_id"]}
        write_text(folder / GENERATION_FILE, json.dumps(config, indent=2) + "\n")
