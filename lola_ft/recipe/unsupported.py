"""Settings the schema knows and this version does not carry out yet: refused, never ignored.

An entry is (path, what is refused, message); `*` in a path stands for every item of a list. Once a setting works,
its entry is deleted here and nothing else changes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lola_ft.recipe.document import KeyPath

_NEXT = "is not supported yet"

UNSUPPORTED: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "train.scheduler",
        lambda value: value in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
        "this schedule needs settings of its own that a recipe cannot give. Choose another, such as cosine",
    ),
    (
        "train.scheduler",
        lambda value: value in ("reduce_lr_on_plateau", "greedy"),
        f"a schedule that follows the evaluation {_NEXT}. Choose another, such as cosine",
    ),
    (
        "train.optimizer",
        lambda value: isinstance(value, str) and (value.startswith(("galore", "apollo")) or "lomo" in value),
        "this optimiser is made for training all weights. Choose another, such as adamw_8bit",
    ),
]


def find(data: Any) -> Iterator[tuple[KeyPath, str]]:
    """The refused settings in a recipe's plain data, valid or not: (path, message)."""
    for path, refused, message in UNSUPPORTED:
        for place, value in _values(data, path.split("."), ()):
            if value is not None and refused(value):
                yield place, message


def _values(data: Any, keys: list[str], place: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not keys:
        yield place, data
    elif keys[0] == "*" and isinstance(data, list):
        for index, item in enumerate(data):
            yield from _values(item, keys[1:], (*place, index))
    elif isinstance(data, dict) and keys[0] in data:
        yield from _values(data[keys[0]], keys[1:], (*place, keys[0]))
