"""Going on with a run: what its folder holds, and whether the recipe is still the one it was started with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_ft.errors import RecipeError, UserError
from lola_ft.files import write_text
from lola_ft.recipe import Recipe, load_recipe
from lola_ft.recipe.schema import Source
from lola_ft.repo_id import is_commit
from lola_ft.training import run_folder
from lola_ft.training.checkpoint import Checkpoint, checkpoints, newest_whole, remove_leftovers

# These do not decide any number that is trained.
_FREE = (
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
_FITTED = ("max_length", "packing")  # of the data section, to what the base can do
_NOTHING = object()


@dataclass(frozen=True)
class EarlierRun:
    """What a run folder holds.

    Attributes:
        recipe: The resolved recipe that the run was started with.
        finished: Whether nothing is left to do.
    """

    folder: Path
    recipe: Recipe
    finished: bool


def find_run(output: Path) -> EarlierRun | None:
    """The run in a folder; None if there is nothing at all.

    Raises:
        UserError: There is something, and it is not a run.
    """
    stored = output / run_folder.RECIPE_FILE
    if not stored.is_file():
        run_folder.refuse_taken(output)
        return None
    try:
        recipe = load_recipe(stored)
    except RecipeError as error:
        raise UserError(f"{output}: this run's recipe cannot be read, so it cannot go on.\n{error}") from error
    return EarlierRun(output, recipe, run_folder.is_finished(output))


def with_stored_commits(recipe: Recipe, stored: Recipe) -> Recipe:
    """The recipe with the commits that the run was started with, where it names none itself."""
    data = recipe.data.model_copy(update={"sources": _at_commits(recipe.data.sources, stored.data.sources)})
    if isinstance(data.validation, list) and isinstance(stored.data.validation, list):
        data = data.model_copy(update={"validation": _at_commits(data.validation, stored.data.validation)})
    return recipe.model_copy(update={"data": data})


def refuse_changes(recipe: Recipe, stored: Recipe, folder: Path, allowed: Iterable[str], fitted: bool = True) -> None:
    """Refuse a recipe that differs from the run's own in anything that decides its numbers.

    Args:
        allowed: Keys that may differ; `data` stands for everything in that section.
        fitted: Whether the recipe's defaults have been fitted to the base yet, as the stored ones have.

    Raises:
        UserError: Listing every differing key with both values, or naming an allowed key that does not exist or
            that no run can change.
    """
    old, new = _flat(stored.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    for key in allowed:
        if not any(_covers(key, known) for known in old | new):
            raise UserError(f"--allow-changed {key}: a recipe has no such key.")
    if recipe.train.optimizer != stored.train.optimizer and any(_covers(key, _OPTIMIZER) for key in allowed):
        raise UserError(
            f"{folder}: {_OPTIMIZER} was {stored.train.optimizer} when this run was started and is "
            f"{recipe.train.optimizer} now: one optimiser's state is nothing to another. Take the change back, or "
            "choose another `output`."
        )
    free = [*_FREE, *allowed]
    if not fitted:
        free += [f"data.{key}" for key in _FITTED if key not in recipe.data.model_fields_set]
    changed = [
        f"  {key}: {_shown(old.get(key, _NOTHING))} there, {_shown(new.get(key, _NOTHING))} now"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key, _NOTHING) != new.get(key, _NOTHING) and not any(_covers(name, key) for name in free)
    ]
    if changed:
        raise UserError(
            f"{folder}: the recipe has changed since this run was started.\n" + "\n".join(changed) + "\n"
            "Take the changes back, allow each with --allow-changed KEY, or choose another `output`."
        )


def restart_point(output: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None if it had not written any. What was half-written is removed.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    folder = output / run_folder.CHECKPOINTS_FOLDER
    remove_leftovers(folder)
    checkpoint = newest_whole(folder, report)
    if checkpoint is None and checkpoints(folder):
        raise UserError(f"{folder}: no checkpoint is whole. Remove that folder to start the run from its beginning.")
    return checkpoint


def rewind_metrics(output: Path, checkpoint: Checkpoint | None) -> None:
    """Make the metrics what they were at the checkpoint: what came after it will be written again."""
    metrics = output / run_folder.METRICS_FILE
    copy = checkpoint.folder / run_folder.METRICS_FILE if checkpoint else None
    if copy is not None and copy.exists():
        write_text(metrics, copy.read_text(encoding="utf-8"))
    else:
        metrics.unlink(missing_ok=True)


def refuse_other_facts(
    checkpoint: Checkpoint, facts: dict[str, Any], allowed: Iterable[str], report: Callable[[str], None]
) -> None:
    """Refuse base weights or data that are not the run's; say so if only versions or the number of threads differ."""
    before, names = checkpoint.state["facts"], list(allowed)
    if before["processes"] != facts["processes"]:
        raise UserError(
            f"{checkpoint.folder}: the number of processes was {before['processes']} when this run was started and is "
            f"{facts['processes']} now. Rows and random numbers are divided among the processes, so it cannot go on "
            f"exactly. Launch {before['processes']} again, or choose another `output`."
        )
    for section, what in (("base", "the base's weights have"), ("data", "the data has")):
        if before[section] != facts[section] and not any(_covers(section, name) for name in names):
            raise UserError(
                f"{checkpoint.folder}: {what} changed since this checkpoint, though the recipe names the same. "
                f"Put them back, allow it with --allow-changed {section}, or choose another `output`."
            )
    for name, version in facts["versions"].items():
        if (then := before["versions"].get(name)) != version:
            report(f"Note: {name} was {then} when the run was stopped and is {version} now: numbers may differ.")
    if (then := before.get("threads")) not in (None, threads := facts["threads"]):
        report(
            f"Note: torch had {then} threads when the run was stopped and has {threads} now: sums are taken in another "
            f"order, so last digits may differ. OMP_NUM_THREADS={then} goes on exactly."
        )


def _at_commits(sources: list[Source], stored: list[Source]) -> list[Source]:
    if len(sources) != len(stored):
        return sources
    return [_at_commit(source, earlier) for source, earlier in zip(sources, stored, strict=True)]


def _at_commit(source: Source, stored: Source) -> Source:
    moving = source.hub is not None and source.hub == stored.hub and source.revision in (None, "main")
    if moving and is_commit(stored.revision):
        return source.model_copy(update={"revision": stored.revision})
    return source


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Settings by dotted key; places in lists count as keys, and what is off is left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {} if value is None else {key: value}
    return {path: item for name, inner in items for path, item in _flat(inner, f"{key}.{name}".lstrip(".")).items()}


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _shown(value: Any) -> str:
    return "not set" if value is _NOTHING else str(value)
