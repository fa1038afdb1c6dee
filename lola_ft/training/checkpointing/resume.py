"""Resuming a run: read its folder, check that nothing has changed, and find the checkpoint to restart from.

An example: `lola-ft train sw.yaml --resume` after a crash at step 437, with `save_every: 200`.

1. `earlier_run` reads `recipe.yaml` in the output folder and refuses a recipe that differs in a way that matters.
2. `lock_run` locks the folder against other processes.
3. `find_restart` takes `checkpoints/step-400`, the newest complete one, and compares base, data and versions with it.
4. It cuts `metrics.jsonl` back to step 400. Steps 401 to 437 are trained again and give the same lines as before.
5. `contents.PutBack` restores the state when training begins.
"""

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
    """A run found in an output folder.

    Attributes:
        recipe: The resolved recipe that the run was started with.
        finished: True if nothing is left to do.
        longer: True if the run was finished and the recipe makes it longer.
    """

    folder: Path
    recipe: Recipe
    finished: bool
    longer: bool = False


def find_run(output: Path, wanted: Recipe) -> EarlierRun | None:
    """Read the run in a folder; None if the folder is empty, a UserError if it holds anything else than a run.

    Args:
        wanted: The recipe to resume with, which may make the run longer.
    """
    stored = output / RECIPE_FILE
    if not stored.is_file():
        run_folder.refuse_taken(output)
        return None
    try:
        recipe = load_recipe(stored)
    except RecipeError as error:
        raise UserError(f"{output}: this run cannot be resumed, because its recipe cannot be read.\n{error}") from error
    if recipe.train.reference_pass == "auto":  # written by an older version, which had only one way
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"reference_pass": "beside"})})
    finished = run_folder.is_finished(output)
    longer = finished and is_longer(wanted, recipe, output)
    return EarlierRun(output, recipe, finished and not longer, longer)


def earlier_run(recipe: Recipe, resume: bool, allow_changed: Sequence[str]) -> EarlierRun | None:
    """Find the run to resume, None if there is none or resuming is off; raises UserError for a changed recipe."""
    output = Path(recipe.output)
    if not resume and recipe.train.resume == "never":
        if allow_changed:
            raise UserError("--allow-changed is for resuming a run. Add --resume, or leave it out.")
        run_folder.refuse_taken(output)
        return None
    earlier = find_run(output, recipe)
    if earlier:
        given = with_stored_choices(recipe, earlier.recipe)
        refuse_changes(given, earlier.recipe, output, allow_changed, fitted=False)
    return earlier


def lock_run(recipe: Recipe, held: ExitStack) -> EarlierRun | None:
    """Lock a run's folder and read it again, because another process may have finished the run in the meantime."""
    output = Path(recipe.output)
    held.enter_context(run_folder.lock_folder(output))
    return find_run(output, recipe)


def find_restart(
    earlier: EarlierRun, recipe: Recipe, facts: dict[str, Any], allow_changed: Sequence[str], console: Console
) -> Checkpoint | None:
    """Find the checkpoint to restart from and rewind the metrics to it.

    Args:
        facts: Facts of the present run (`setup.facts_of`), which must equal the checkpoint's.

    Returns:
        The checkpoint; None to start from the beginning.

    Raises:
        UserError: Base or data have changed, or the recipe's length ends before the checkpoint.
    """

    say = console.print

    def find() -> Path | None:  # runs only in the main process
        checkpoint = restart_point(earlier.folder, say)
        if checkpoint:
            refuse_other_facts(checkpoint, facts, allow_changed, say)
            if length_of(recipe) != length_of(earlier.recipe):
                refuse_shorter(recipe, checkpoint.folder)
            say(f"Going on from step {checkpoint.step} ({checkpoint.folder}).")
        else:
            say(f"The run in {earlier.folder} has no checkpoint yet, so it starts from its beginning.")
        if earlier.longer:
            reopen(earlier.folder, checkpoint, recipe, say)
        rewind_metrics(earlier.folder, checkpoint)
        found.append(checkpoint)
        return checkpoint.folder if checkpoint else None

    found = list[Checkpoint | None]()
    folder = processes.on_main(find)
    if found:  # this is the main process, which has read the checkpoint
        return found[0]
    return Checkpoint(folder, read_state(folder)) if folder else None  # the others read it again


def restart_point(output: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest complete checkpoint; None if there are no checkpoints, a UserError if all are damaged."""
    folder = output / CHECKPOINTS_FOLDER
    remove_leftovers(folder)
    checkpoint = newest_whole(folder, report)
    if checkpoint is None and checkpoints(folder):
        raise UserError(
            f"{folder}: all checkpoints are damaged. Remove that folder to start the run from its beginning."
        )
    return checkpoint


def rewind_metrics(output: Path, checkpoint: Checkpoint | None) -> None:
    """Restore the metrics file as of the checkpoint; the steps after it will be trained and written again."""
    metrics = output / METRICS_FILE
    copy = checkpoint.folder / METRICS_FILE if checkpoint else None
    if copy is not None and copy.exists():
        write_text(metrics, copy.read_text(encoding="utf-8"))
    else:
        metrics.unlink(missing_ok=True)


def refuse_other_facts(
    checkpoint: Checkpoint, facts: dict[str, Any], allowed: Iterable[str], report: Callable[[str], None]
) -> None:
    """Raise UserError if base, data or processes have changed; report changed versions and numbers of threads."""
    before, names = checkpoint.state["facts"], list(allowed)
    if before["processes"] != facts["processes"]:
        raise UserError(
            f"{checkpoint.folder}: the number of processes was {before['processes']} when this run was started and is "
            f"{facts['processes']} now. Rows and random numbers are divided among the processes, so the run cannot "
            f"resume exactly. Launch {before['processes']} again, or choose another `output`."
        )
    for section, what in (("base", "the base's weights have"), ("data", "the data has")):
        if before[section] != facts[section] and not any(covers(section, name) for name in names):
            raise UserError(
                f"{checkpoint.folder}: {what} changed since this checkpoint, although the recipe names the same files. "
                f"Restore them, allow the change with --allow-changed {section}, or choose another `output`."
            )
    for name, version in facts["versions"].items():
        if (then := before["versions"].get(name)) != version:
            report(f"Note: {name} was {then} when the run was stopped and is {version} now: numbers may differ.")
    if (then := before.get("threads")) not in (None, threads := facts["threads"]):
        report(
            f"Note: torch had {then} threads when the run was stopped and has {threads} now. Sums are computed in "
            f"another order, so last digits may differ. A run with OMP_NUM_THREADS={then} goes on exactly."
        )
