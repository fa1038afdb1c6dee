"""'Did you mean': the key or word that was probably meant."""

from collections.abc import Sequence
from difflib import get_close_matches

from lola_ft.recipe.keys import all_keys, section_at

OTHER_TOOLS = {
    "lr": "train.learning_rate",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr_scheduler_type": "train.scheduler",
    "lr_scheduler": "train.scheduler",
    "optim": "train.optimizer",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "save_total_limit": "train.keep",
    "r": "adapter.attention.rank",
    "lora_r": "adapter.attention.rank",
    "lora_rank": "adapter.attention.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "val_set_size": "data.validation",
    "datasets": "data.sources",
    "dataset": "data.sources",
    "base_model": "base.model",
    "model_name_or_path": "base.model",
    "load_in_4bit": "base.quantization",
    "torch_dtype": "base.dtype",
    "output_dir": "output",
}
"""What other fine-tuning tools call a setting that a recipe has."""


def suggest_word(given: object, words: Sequence[str]) -> str:
    """A hint such as " Did you mean 'cosine'?", or nothing."""
    close = get_close_matches(str(given).lower(), words, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def suggest_key(path: Sequence[str | int]) -> str:
    """A hint for an unknown key: one of its section, or the place where such a key belongs.

    Args:
        path: Where the key was found, the key last.
    """
    *parents, key = [part for part in path if isinstance(part, str)]
    section = section_at(parents)
    siblings = list(section.model_fields) if section else []
    if "." in str(key) and str(key) in all_keys():
        return f" Dots work on the command line only; write {_nested(str(key))}."
    if meant := _belongs(str(key), parents):
        leaf = meant.rpartition(".")[2]
        return f" Did you mean '{leaf if meant == '.'.join([*parents, leaf]) else meant}'?"
    if hint := suggest_word(key, siblings):
        return hint
    if close := get_close_matches(str(key).lower(), [name.rpartition(".")[2] for name in all_keys()], n=1):
        home = _belongs(close[0], parents).rpartition(".")[0]
        return f" Did you mean '{close[0]}'? It belongs {f'in {home}' if home else 'at the top'}"
    return ""


def _nested(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"`{first}: {{{rest.replace('.', ': {')}: …{'}' * rest.count('.')}}}`"


def _belongs(key: str, parents: list[str]) -> str:
    """The dotted place of a key with this very name, nearest to `parents`; "" if no section has one."""
    places = [place for place in all_keys() if place.rpartition(".")[2] == key]
    if key in OTHER_TOOLS:
        leaf = OTHER_TOOLS[key].rpartition(".")[2]
        places += [OTHER_TOOLS[key], *(place for place in all_keys() if place.rpartition(".")[2] == leaf)]
    below = [place for place in places if parents and place.startswith(".".join(parents) + ".")]
    return next(iter([*below, *places]), "")
