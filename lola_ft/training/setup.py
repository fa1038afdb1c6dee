"""Everything decided before the first step: `train`, `preview` and `plan` prepare a recipe in the same way here.

A recipe is fitted to its base first (`fit_to_base`), then its data is read (`read_data`); only a run then loads the
base with an adapter (`prepare_run`).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from lola_ft.console import Console
from lola_ft.environment import library_versions
from lola_ft.errors import UserError
from lola_ft.planning.reference_passes import ReferencePasses
from lola_ft.recipe import Recipe
from lola_ft.recipe.schema import Train
from lola_ft.training import base_model, processes
from lola_ft.training.base_model import OpenBase, SizesByPart
from lola_ft.training.checkpointing.recipe_changes import refuse_changes, with_stored_choices
from lola_ft.training.dataset import RunData, pin, prepare
from lola_ft.training.optional_packages import refuse_missing_packages
from lola_ft.training.precision import Precision, choose_precision
from lola_ft.training.reference_choice import choose_reference_pass
from lola_ft.training.reports.metrics import BY_LANGUAGE
from lola_ft.training.reports.tables import count_trainable, print_report, trainable_table
from lola_ft.training.starting_adapter import StartingAdapter, find_start, warn_of_other_template

if TYPE_CHECKING:
    from peft import PeftModel

    from lola_ft.training.checkpointing.resume import EarlierRun


@dataclass(frozen=True)
class Prepared:
    """Everything that must be right before the first byte is written.

    Attributes:
        recipe: Fitted to the base, its data pinned to commits.
        audit: The sizes of the base's parts as they are held in memory.
        trained: Tensors and parameters that are trained, by group.
        start: The adapter that training goes on from, if it is not a fresh one.
        reference: What the reference of preferences costs; None for other objectives.
    """

    recipe: Recipe
    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerFast
    data: RunData
    model: "PeftModel"
    audit: SizesByPart
    trained: dict[str, tuple[int, int]]
    start: StartingAdapter | None = None
    reference: ReferencePasses | None = None


def prepare_run(
    recipe: Recipe,
    device: torch.device,
    console: Console,
    earlier: "EarlierRun | None" = None,
    allow_changed: Sequence[str] = (),
) -> Prepared:
    """Check everything that the user gave, read the data and load the base with its adapter.

    The recipe may differ from that of an `earlier` run, which goes on, in `allow_changed` alone.
    """
    from transformers import set_seed  # here, for it imports PEFT, and plans and previews do without

    refuse_missing_packages(recipe.train)
    precision = choose_precision(recipe.base.dtype, device)
    if precision.note:
        console.print(precision.note)
    if earlier:
        recipe = with_stored_choices(recipe, earlier.recipe)
    recipe, base = fit_to_base(recipe, console, weights=True, run=earlier.folder if earlier else None)
    refuse_offload(recipe, base, device.type, processes.count())
    recipe, tokenizer, data = read_data(recipe, base, earlier, allow_changed)
    refuse_unknown_metric(recipe.train, data, recipe.objective)
    print_report(data, console)
    steps = estimate_steps(recipe, data.mix.tokens, len(data.mix.dataset), processes.count())
    validation_rows = len(data.validation.dataset) if data.validation else 0
    recipe, passes = choose_reference_pass(recipe, base, len(data.mix.dataset), validation_rows, steps)
    if passes:
        console.print(passes.line(recipe.train.reference_pass))
    set_seed(recipe.train.seed)
    model, sizes = base_model.load_with_adapter(base, recipe, precision.dtype, device, console)
    trained = count_trainable(model)
    console.print(trainable_table(trained, base_model.adapter_settings(recipe).ranks(), base.architecture.features))
    return Prepared(recipe, device, precision, tokenizer, data, model, sizes, trained, base.start, passes)


def fit_to_base(
    recipe: Recipe, console: Console, weights: bool = False, run: Path | None = None
) -> tuple[Recipe, OpenBase]:
    """Find the recipe's base and the adapter to go on from, once, and hold the recipe to both.

    Args:
        weights: Check the base's weights, too.
        run: The folder of the run to resume.
    """
    start = find_start(recipe.adapter, run)  # first: a damaged adapter is found before anything large is fetched
    base = replace(base_model.open_base(recipe.base.model, recipe.base.revision, weights), start=start)
    recipe = base_model.continue_recipe(recipe, base)
    if start:
        warn_of_other_template(start, recipe.data.template, console)
    return base_model.fit_recipe(recipe, base, console), base


def refuse_offload(recipe: Recipe, base: OpenBase, device: str, processes: int = 1) -> None:
    """Refuse `base.offload` where the base or the machine makes no sense of it."""
    if recipe.base.offload != "none":
        quantization = None if recipe.base.quantization == "none" else recipe.base.quantization
        base.architecture.refuse_offload(quantization, device, processes)


def read_data(
    recipe: Recipe, base: OpenBase, earlier: "EarlierRun | None" = None, allow_changed: Sequence[str] = ()
) -> tuple[Recipe, PreTrainedTokenizerFast, RunData]:
    """Pin the recipe's data to commits, read it and turn it into tokens.

    Returns:
        The recipe with the commits, the base's tokenizer, and the data.

    Raises:
        UserError: Naming file and line, or what differs from the earlier run.
    """
    tokenizer = base.tokenizer(recipe.data.special_tokens)
    recipe = recipe.model_copy(update={"data": pin(recipe.data)})
    if earlier:
        refuse_changes(recipe, earlier.recipe, earlier.folder, allow_changed)
    return recipe, tokenizer, prepare(recipe.data, tokenizer, recipe.train.seed)


def refuse_unknown_metric(train: Train, data: RunData, objective: str) -> None:
    """Refuse early stopping by a metric that no evaluation will have."""
    languages = sorted(set(data.validation.languages)) if data.validation and objective == "sft" else []
    known = ["eval_loss", *(f"{BY_LANGUAGE}/{code}" for code in languages)]
    if train.early_stopping and train.early_stopping.metric not in known:
        raise UserError(
            f"train.early_stopping.metric: there is no '{train.early_stopping.metric}'. Choose one of "
            f"{', '.join(known)}."
        )


def estimate_steps(recipe: Recipe, tokens: int, sequences: int, processes: int = 1) -> int:
    """Estimate a run's optimiser steps from an epoch's tokens and sequences; packing is taken to be perfect."""
    train = recipe.train
    if train.max_steps:
        return train.max_steps
    rows = math.ceil(tokens / recipe.data.max_length) if recipe.data.packing else sequences
    rows_per_step = train.micro_batch_size * train.grad_accum_steps * processes
    return max(1, math.ceil(rows / rows_per_step * train.epochs))


def short_data_line(rows: int, rows_per_step: int) -> str:
    """Say what a step is where it takes more rows than there are."""
    return (
        f"A step takes {rows_per_step:,} rows (micro batch times accumulation) and the data has {rows:,}: each step is "
        "a whole epoch. Lower train.grad_accum_steps or train.micro_batch_size for more steps per epoch."
    )


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a run to go on exactly, beside the recipe."""
    data = prepared.data.as_dict()
    contents = {**data, "sha256": sorted(data["sha256"].values()), "template": prepared.data.template.source}
    return {
        "base": prepared.model.get_base_model().base_fingerprint,
        "data": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def reference_facts(prepared: Prepared) -> dict[str, str]:
    """Return what the reference's log-probabilities depend on beside the rows."""
    recipe, start = prepared.recipe, prepared.start
    of_adapter = recipe.train.reference == "adapter" and start is not None
    return {
        "reference": "adapter" if of_adapter else "base",
        "adapter": start.as_dict()["sha256"] if of_adapter and start else "",
        "base": prepared.model.get_base_model().base_fingerprint,
        "quantization": recipe.base.quantization,
        "dtype": str(prepared.precision.dtype),
    }
