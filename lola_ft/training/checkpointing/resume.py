"""Going on with a run: what its folder holds, and the checkpoint from which it goes on."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_ft.console import Console
from lola_ft.errors import RecipeError, UserError
from lola_ft.file_names import CHECKPOINTS_FOLDER, METRICS_FILE, RECIPE_FILE
from lola_ft.files import write_text
from lola_ft.recipe import Recipe, load_recipe
from lola_ft.training import processes, run_folder
from lola_ft.training.checkpointing.checkpoint import Checkpoint, checkpoints, newest_whole, remove_leftovers
from lola_ft.training.checkpointing.longer import is_longer, refuse_shorter, reopen
from lola_ft.training.checkpointing.recipe_changes import covers, length_of, refuse_changes, with_stored_choices
from lola_ft.training.checkpointing.state_file import read_state


@dataclass(frozen=True)
class EarlierRun:
    """A run that a folder holds.

    Attributes:
        recipe: The resolved recipe that the run was started with.
        finished: Whether nothing is left to do.
        longer: Whether it was finished, and the recipe makes it longer.
    """

    folder: Path
    recipe: Recipe
    finished: bool
    longer: bool = False


def find_run(output: Path, wanted: Recipe) -> EarlierRun | None:
    """Read the run in a folder; returns None if nothing is there, raises UserError for anything that is not a run.

    Args:
        wanted: The recipe to go on with, which may make the run longer.
    """
    stored = output / RECIPE_FILE
    if not stored.is_file():
        run_folder.refuse_taken(output)
        return None
    try:
        recipe = load_recipe(stored)
    except RecipeError as error:
        raise UserError(f"{output}: this run's recipe cannot be read, so it cannot go on.\n{error}") from error
    if recipe.train.reference_pass == "auto":  # written when there was one way only
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"reference_pass": "beside"})})
    finished = run_folder.is_finished(output)
    longer = finished and is_longer(wanted, recipe, output)
    return EarlierRun(output, recipe, finished and not longer, longer)


def earlier_run(recipe: Recipe, resume: bool, allow_changed: Sequence[str]) -> EarlierRun | None:
    """Find the run to go on with, if that is wanted and there is one; refuse a recipe that differs from its own."""
    output = Path(recipe.output)
    if not resume and recipe.train.resume == "never":
        if allow_changed:
            raise UserError("--allow-changed is for going on with a run. Add --resume, or leave it out.")
        run_folder.refuse_taken(output)
        return None
    earlier = find_run(output, recipe)
    if earlier:
        given = with_stored_choices(recipe, earlier.recipe)
        refuse_changes(given, earlier.recipe, output, allow_changed, fitted=False)
    return earlier


def lock_run(recipe: Recipe, held: ExitStack) -> EarlierRun | None:
    """Lock a run's folder, and read it again: the process that held the lock until now may have finished the run."""
    output = Path(recipe.output)
    held.enter_context(run_folder.lock_folder(output))
    return find_run(output, recipe)


def find_restart(
    earlier: EarlierRun, recipe: Recipe, facts: dict[str, Any], allow_changed: Sequence[str], console: Console
) -> Checkpoint | None:
    """Find the checkpoint to go on from, whose facts must be these, and rewind the metrics; None: the beginning.

    Raises:
        UserError: The recipe, which may change the run's length, ends before that checkpoint.
    """

    say = console.print

    def find() -> Path | None:
        checkpoint = restart_point(earlier.folder, say)
        if checkpoint:
            refuse_other_facts(checkpoint, facts, allow_changed, say)
            if length_of(recipe) != length_of(earlier.recipe):
                refuse_shorter(recipe, checkpoint.folder)
            say(f"Going on from step {checkpoint.step} ({checkpoint.folder}).")
        else:
            say(f"The run in {earlier.folder} has no checkpoint yet; it starts from its beginning.")
        if earlier.longer:
            reopen(earlier.folder, checkpoint, recipe, say)
        rewind_metrics(earlier.folder, checkpoint)
        found.append(checkpoint)
        return checkpoint.folder if checkpoint else None

    found = list[Checkpoint | None]()
    folder = processes.on_main(find)
    if found:  # by this process
        return found[0]
    return Checkpoint(folder, read_state(folder)) if folder else None


def restart_point(output: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run, None if it has none; refuse a run that has only damaged ones."""
    folder = output / CHECKPOINTS_FOLDER
    remove_leftovers(folder)  # half-written ones
    checkpoint = newest_whole(folder, report)
    if checkpoint is None and checkpoints(folder):
        raise UserError(f"{folder}: no checkpoint is whole. Remove that folder to start the run from its beginning.")
    return checkpoint


def rewind_metrics(output: Path, checkpoint: Checkpoint | None) -> None:
    """Make the metrics what they were at the checkpoint: what came after it will be written again."""
    metrics = output / METRICS_FILE
    copy = checkpoint.folder / METRICS_FILE if checkpoint else None
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
        if before[section] != facts[section] and not any(covers(section, name) for name in names):
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
