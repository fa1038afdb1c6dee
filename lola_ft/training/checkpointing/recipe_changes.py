"""Comparison of a recipe with the one that a run was started with: harmless differences, and those that are refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lola_ft.errors import UserError
from lola_ft.recipe import Recipe
from lola_ft.recipe.schema import Source
from lola_ft.repo_id import is_commit
from lola_ft.training.continued_recipe import keys_left_out

# Keys that affect no trained number.
_FREE = (
    "base.offload",
    "train.save_every",
    "train.keep",
    "train.eval_every",
    "train.log_every",
    "train.resume",
    "train.report_to",
    "train.energy",
    "guards",
    "hub",
    "output",
)
_OPTIMIZER = "train.optimizer"
_LENGTH = ("train.max_steps", "train.epochs")
_EXTENDED = "train.extended_schedule"  # has an effect only when the length changes
_START = "adapter.continue_from"
_FITTED = ("max_length", "packing")  # keys of the data section whose defaults are fitted to the base
_NOTHING = object()


def with_stored_choices(recipe: Recipe, stored: Recipe) -> Recipe:
    """Return the recipe with the choices made when the run was started, where the recipe leaves them open.

    These choices are the commits of branches and tags, and `train.reference_pass` if it is `auto`.
    """
    data = recipe.data.model_copy(update={"sources": _at_commits(recipe.data.sources, stored.data.sources)})
    if isinstance(data.validation, list) and isinstance(stored.data.validation, list):
        data = data.model_copy(update={"validation": _at_commits(data.validation, stored.data.validation)})
    base = recipe.base
    if base.model == stored.base.model and not is_commit(base.revision) and is_commit(stored.base.revision):
        base = base.model_copy(update={"revision": stored.base.revision})
    adapter = recipe.adapter
    same_start = adapter.continue_from is not None and adapter.continue_from == stored.adapter.continue_from
    if same_start and not is_commit(adapter.revision) and is_commit(stored.adapter.revision):
        adapter = adapter.model_copy(update={"revision": stored.adapter.revision})
    train = recipe.train
    if train.reference_pass == "auto" and stored.train.reference_pass is not None:
        train = train.model_copy(update={"reference_pass": stored.train.reference_pass})
    return recipe.model_copy(update={"data": data, "base": base, "adapter": adapter, "train": train})


def refuse_changes(recipe: Recipe, stored: Recipe, folder: Path, allowed: Iterable[str], fitted: bool = True) -> None:
    """Raise UserError if a recipe differs from the run's recipe in a key that affects trained numbers.

    Args:
        allowed: Keys that may differ. `data` includes all keys of that section, and either key of the length (steps or
            epochs) includes both.
        fitted: True if the recipe's defaults are already fitted to the base, as those of the stored recipe are.

    Raises:
        UserError: Keys differ (the message lists all with both values), or an allowed key does not exist or cannot be
            changed by any run.
    """
    old, new = _flat(stored.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    for key in allowed:
        if not any(covers(key, known) for known in old | new):
            raise UserError(f"--allow-changed {key}: a recipe has no such key.")
    if recipe.train.optimizer != stored.train.optimizer and any(covers(key, _OPTIMIZER) for key in allowed):
        raise UserError(
            f"{folder}: {_OPTIMIZER} was {stored.train.optimizer} when this run was started and is "
            f"{recipe.train.optimizer} now, and an optimiser cannot use another one's state. Undo the change, or "
            "choose another `output`."
        )
    if recipe.adapter.continue_from != stored.adapter.continue_from:
        raise UserError(
            f"{folder}: {_START} was {stored.adapter.continue_from or 'not set'} when this run was started and is "
            f"{recipe.adapter.continue_from or 'not set'} now, and a run cannot change its start. Undo the change (the "
            "adapter itself is no longer needed), or choose another `output`."
        )
    free = [*_FREE, *allowed]
    if any(covers(key, name) for key in allowed for name in _LENGTH):  # one key may replace the other
        free += [*_LENGTH, *([_EXTENDED] if length_of(recipe) != length_of(stored) else [])]
    if not fitted:
        free += keys_left_out(recipe) if recipe.adapter.continue_from else []
        free += [f"data.{key}" for key in _FITTED if key not in recipe.data.model_fields_set]
    changed = [
        f"  {key}: {_shown(old.get(key, _NOTHING))} there, {_shown(new.get(key, _NOTHING))} now"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key, _NOTHING) != new.get(key, _NOTHING) and not any(covers(name, key) for name in free)
    ]
    if changed:
        raise UserError(
            f"{folder}: the recipe has changed since this run was started.\n" + "\n".join(changed) + "\n"
            "Undo the changes, allow each with --allow-changed KEY, or choose another `output`."
        )


def length_of(recipe: Recipe) -> tuple[str, float]:
    """Return the key that sets a run's length, and its value."""
    steps = recipe.train.max_steps
    return (_LENGTH[1], recipe.train.epochs) if steps is None else (_LENGTH[0], steps)


def _at_commits(sources: list[Source], stored: list[Source]) -> list[Source]:
    if len(sources) != len(stored):
        return sources
    result = list(sources)
    for place, (source, earlier) in enumerate(zip(sources, stored, strict=True)):
        moving = source.hub is not None and source.hub == earlier.hub and source.revision in (None, "main")
        if moving and is_commit(earlier.revision):
            result[place] = source.model_copy(update={"revision": earlier.revision})
    return result


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return settings by dotted key; list indices are parts of a key, and settings that are None are left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {} if value is None else {key: value}
    return {path: item for name, inner in items for path, item in _flat(inner, f"{key}.{name}".lstrip(".")).items()}


def covers(name: str, key: str) -> bool:
    """Tell whether `key` is the key or in the section called `name`."""
    return key == name or key.startswith(f"{name}.")


def _shown(value: Any) -> str:
    return "not set" if value is _NOTHING else str(value)
