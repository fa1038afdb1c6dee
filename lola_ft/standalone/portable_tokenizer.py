"""A tokenizer's files in the form that every version of transformers from 4.41 on reads.

transformers 5 and tokenizers 0.20 write two things that earlier versions do not support: the class `TokenizersBackend`,
and each merge of a BPE vocabulary as a list of two pieces. Later versions also read the earlier forms.
"""

import json
from pathlib import Path
from typing import Any

from lola_ft.files import write_text

_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def make_tokenizer_portable(folder: Path) -> None:
    """Rewrite a folder's tokenizer files if they need it, without a change of meaning; name its class in the config.

    Pipelines of transformers 4 load a tokenizer only if the model's config names its class.
    """
    config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config_file.is_file():
        config = _portable_config(_read(config_file), folder)
        _rewrite(config_file, config)
        if config.get("tokenizer_class"):
            model_config = folder / "config.json"
            _rewrite(model_config, _read(model_config) | {"tokenizer_class": config["tokenizer_class"]})
    if tokenizer_file.is_file():
        _rewrite(tokenizer_file, _portable_merges(_read(tokenizer_file)))


def _portable_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    own = config.get("tokenizer_class")
    changed = config | {"tokenizer_class": _CLASSES.get(str(own), own)}
    if isinstance(changed.get("extra_special_tokens"), list):  # before 5 this key holds a dict, and the list is in:
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    template = folder / "chat_template.jinja"
    if template.is_file():  # earlier versions look for it only in the config
        changed.setdefault("chat_template", template.read_text(encoding="utf-8"))
    return changed


def _portable_merges(tokenizer: dict[str, Any]) -> dict[str, Any]:
    model = tokenizer.get("model") or {}
    merges = model.get("merges") or []
    pairs = [merge for merge in merges if isinstance(merge, list)]
    if any(" " in piece for pair in pairs for piece in pair):
        return tokenizer  # the earlier form cannot express where this pair is divided
    return tokenizer | {"model": model | {"merges": [" ".join(m) if isinstance(m, list) else m for m in merges]}}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _rewrite(file: Path, content: dict[str, Any]) -> None:
    if content != _read(file):
        write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
