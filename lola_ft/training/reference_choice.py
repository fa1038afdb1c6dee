"""The choice of when DPO and KTO compute their reference, from the cost of each way in a recipe's run."""

import math

from lola_ft.planning.adapter_sizes import adapter_sizes
from lola_ft.planning.reference_passes import ReferencePasses, reference_passes
from lola_ft.recipe import Recipe
from lola_ft.recipe.allowed_values import OBJECTIVE_FORMATS
from lola_ft.training import processes
from lola_ft.training.base_model import OpenBase, adapter_settings


def choose_reference_pass(
    recipe: Recipe, base: OpenBase, rows: int | None, validation_rows: int = 0, steps: int = 0
) -> tuple[Recipe, ReferencePasses | None]:
    """Return the recipe with `train.reference_pass` decided if possible, and the costs of both ways.

    Args:
        rows: Rows of an epoch; None if the data was not read.
        steps: Steps of the whole run.

    Returns:
        The recipe and the costs; None in place of the costs for an objective without a reference.
    """
    train = recipe.train
    if recipe.objective not in OBJECTIVE_FORMATS:
        return recipe, None
    copy_bytes = 0
    if train.reference == "adapter":
        settings = adapter_settings(recipe, base.trained_tokens(recipe.data.special_tokens)[0])
        copy_bytes = adapter_sizes(base.trained_architecture(recipe), settings).held
    if rows is None:
        passes = ReferencePasses(None, None, copy_bytes)
    else:
        rows_per_step = train.micro_batch_size * train.grad_accum_steps * processes.count()
        seen = train.max_steps * rows_per_step if train.max_steps else math.ceil(rows * train.epochs)
        evaluations = (steps // train.eval_every if train.eval_every else 0) + 1  # plus the final evaluation
        passes = reference_passes(rows, seen, validation_rows, evaluations, copy_bytes)
    if train.reference_pass != "auto" or passes.cheaper is None:
        return recipe, passes
    decided = train.model_copy(update={"reference_pass": passes.cheaper})
    return recipe.model_copy(update={"train": decided}), passes
