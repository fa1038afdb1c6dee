"""The schema's keys by their dotted names, and suggestions of the key or word that was probably meant."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin

from lola_ft.recipe.document import KeyPath
from lola_ft.recipe.schema import Recipe, Section


@cache
def all_keys() -> tuple[str, ...]:
    """Return every key of a recipe, such as `train.max_steps`; list items have no index in the name."""
    return tuple(_keys(Recipe, ""))


def section_at(keys: Sequence[str]) -> type[Section] | None:
    """Return the section class at a path of keys; None if the path leads to no section."""
    section: type[Section] | None = Recipe
    for key in keys:
        info = section.model_fields.get(key) if section else None
        section = _inner_section(info.annotation) if info else None
    return section


def own_key(path: KeyPath) -> tuple[type[Section], KeyPath] | None:
    """Return the innermost section on a path and the path of that section's key; None if there is none.

    For `data.sources.0.fields.text` the section is Source, and the key is `data.sources.0.fields`.
    """
    for end in range(len(path), 0, -1):
        section = section_at([part for part in path[: end - 1] if isinstance(part, str)])
        if section and path[end - 1] in section.model_fields:
            return section, path[:end]
    return None


def describe_key(path: Sequence[str | int]) -> str:
    """Return the schema's one-line description of a key; "" if the key is unknown."""
    *parents, key = [part for part in path if isinstance(part, str)]
    section = section_at(parents)
    info = section.model_fields.get(key) if section else None
    return (info.description or "") if info else ""


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if inner := _inner_section(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _inner_section(annotation: Any) -> type[Section] | None:
    """Return the section inside an annotation such as `GroupLora | None` or `list[Source]`."""
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    return next((inner for inner in map(_inner_section, get_args(annotation)) if inner), None)


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
    "adapter_name_or_path": "adapter.continue_from",
    "lora_model_dir": "adapter.continue_from",
    "base.adapter": "adapter.continue_from",
    "adapter.start": "adapter.continue_from",
}
"""Other tools' names of a recipe's settings; with a section if the bare name means something else."""


def suggest_word(given: object, words: Sequence[str]) -> str:
    """Return a hint such as " Did you mean 'cosine'?"; "" if no word is close."""
    close = get_close_matches(str(given).lower(), words, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def suggest_key(path: Sequence[str | int]) -> str:
    """Return a hint for an unknown key: a similar key of its section, or the section where the key belongs."""
    *parents, key = [part for part in path if isinstance(part, str)]
    section = section_at(parents)
    siblings = list(section.model_fields) if section else []
    if "." in str(key) and str(key) in all_keys():
        return f" Dots in keys work only on the command line; write {_nested(str(key))}."
    if meant := OTHER_TOOLS.get(".".join([*parents, str(key)])) if parents else None:
        return f" Did you mean '{meant}'?"
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
    """Return the dotted name of the key called exactly `key` nearest to `parents`; "" if no section has one."""
    places = [place for place in all_keys() if place.rpartition(".")[2] == key]
    if key in OTHER_TOOLS:
        leaf = OTHER_TOOLS[key].rpartition(".")[2]
        places += [OTHER_TOOLS[key], *(place for place in all_keys() if place.rpartition(".")[2] == leaf)]
    below = [place for place in places if parents and place.startswith(".".join(parents) + ".")]
    return next(iter([*below, *places]), "")
