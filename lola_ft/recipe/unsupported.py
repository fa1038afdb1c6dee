"""Settings that the schema knows but this version does not support yet. They are refused, never ignored.

An entry is (section, key, test of a refused value, message). When a setting becomes supported, deleting its entry is
the only change needed.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lola_ft.recipe.document import KeyPath

UNSUPPORTED: list[tuple[str, str, Callable[[Any], bool], str]] = [
    (
        "train",
        "scheduler",
        lambda value: value in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
        "this schedule needs settings of its own that a recipe cannot give. Choose another, such as cosine",
    ),
    (
        "train",
        "scheduler",
        lambda value: value in ("reduce_lr_on_plateau", "greedy"),
        "a schedule that follows the evaluation is not supported yet. Choose another, such as cosine",
    ),
    (
        "train",
        "optimizer",
        lambda value: isinstance(value, str) and (value.startswith(("galore", "apollo")) or "lomo" in value),
        "this optimiser is made for training all weights. Choose another, such as adamw_8bit",
    ),
]


def find(data: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path, message) of the refused settings in a recipe's plain data, valid or not."""
    for section, key, refused, message in UNSUPPORTED:
        settings = data.get(section) if isinstance(data, dict) else None
        if isinstance(settings, dict) and settings.get(key) is not None and refused(settings[key]):
            yield (section, key), message
