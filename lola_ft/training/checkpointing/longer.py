"""Making a run longer: `--resume --allow-changed train.max_steps` (or `train.epochs`) with a larger number.

A run writes a checkpoint after its last step, for every `train.save_every`, and a longer run resumes from it.
An example: a run of 300 steps is finished, and `train.max_steps` becomes 500.

1. `is_longer` compares 500 with the 300 steps of the last checkpoint: 200 are left.
2. `reopen` removes the model card and the manifest, so that the run counts as unfinished.
3. The run resumes at step 301. Its schedule is stretched over 500 steps, or restarted for 200
   (`train.extended_schedule`); `SaysLonger` prints the learning rate.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from lola_ft.errors import UserError
from lola_ft.file_names import CARD_FILE, CHECKPOINTS_FOLDER, MANIFEST_FILE, MERGED_FOLDER
from lola_ft.recipe import Recipe
from lola_ft.training.checkpointing.checkpoint import Checkpoint, checkpoints
from lola_ft.training.checkpointing.recipe_changes import length_of


def is_longer(recipe: Recipe, stored: Recipe, run: Path) -> bool:
    """Tell whether a recipe makes a finished run longer.

    Raises:
        UserError: The recipe makes the run shorter, or the checkpoints are gone.
    """
    if length_of(recipe) == length_of(stored):
        return False
    found = checkpoints(run / CHECKPOINTS_FOLDER)
    if not found:
        raise UserError(
            f"{run}: this run is finished and its checkpoints are gone, so it cannot be made longer. Begin another run "
            f"with adapter.continue_from={run}, which continues training its adapter with a fresh optimiser."
        )
    return refuse_shorter(recipe, found[-1]) > 0


def refuse_shorter(recipe: Recipe, checkpoint: Path) -> float:
    """Return the part of a recipe's length that is left after a checkpoint, in steps or epochs.

    Raises:
        UserError: The checkpoint is beyond the recipe's length.
    """
    key, wanted = length_of(recipe)
    progress = _progress(checkpoint)
    done = progress["global_step" if key == "train.max_steps" else "epoch"]
    if wanted < done:
        raise UserError(
            f"{key}: {wanted:g}, but {checkpoint.parent.parent} has trained {done:.6g} already. A run can be made "
            f"longer, not shorter: give more than {done:.6g}, or choose another `output`."
        )
    return wanted - done


def planned_steps(checkpoint: Path) -> int:
    """Return the run's length in steps at the time a checkpoint was written."""
    return int(_progress(checkpoint)["max_steps"])


def _progress(checkpoint: Path) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        progress["global_step"], progress["epoch"], progress["max_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint / TRAINER_STATE_NAME}: damaged ({error!r}), so the checkpoint's step is unknown."
        ) from error
    return progress


def reopen(run: Path, checkpoint: Checkpoint | None, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Mark a finished run as unfinished, so that it can be stopped and resumed like any other run.

    Raises:
        UserError: Early stopping would end the run again at once. Nothing was changed.
    """
    stopping = recipe.train.early_stopping
    best = checkpoint.state.get("kept", {}).get("best") if checkpoint else None
    if stopping and best and best["waited"] >= stopping.patience:
        raise UserError(
            f"{run}: early stopping ended this run after {best['waited']} evaluations without improvement, and would "
            "end it again. Raise train.early_stopping.patience, or set train.early_stopping=null, with "
            "--allow-changed train.early_stopping."
        )
    for name in (CARD_FILE, MANIFEST_FILE):  # the card first: a run without a card counts as unfinished
        (run / name).unlink(missing_ok=True)
    if (run / MERGED_FOLDER).is_dir():
        say(f"{run / MERGED_FOLDER} was merged from the shorter run. Merge again at the end, to another folder.")


class SaysLonger(TrainerCallback):
    """Prints the schedule of a run that is made longer. Add it after the callback that restores the checkpoint."""

    def __init__(self, trainer: Any, say: Callable[[str], None]) -> None:
        self._trainer, self._say = trainer, say

    def on_train_begin(self, *_: object, **__: object) -> None:
        trainer = self._trainer
        if not trainer.length_changed:
            return
        step, before, steps, schedule = (trainer.run.extensions[-1][key] for key in ("step", "from", "to", "schedule"))
        rate, name = trainer.lr_scheduler.get_last_lr()[0], trainer.args.lr_scheduler_type.value
        how = (
            f"stretched over all {steps:,} steps" if schedule == "stretch" else f"restarted for {steps - step:,} steps"
        )
        self._say(
            f"The run has {steps:,} steps now in place of {before:,}. Its schedule ({name}) is {how}: the learning "
            f"rate is {rate:.3g} at step {step + 1:,}. train.extended_schedule chooses between stretch and restart."
        )
