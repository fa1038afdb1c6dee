"""All decisions before the first step. `train`, `preview` and `plan` all prepare a recipe here, in the same way.

First the recipe is checked against its base (`fit_to_base`), then its data is read (`read_data`). Only a run then loads
the base with an adapter (`prepare_run`).
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
    """A run that is ready to train: all that is checked and loaded before the first byte is written.

    Attributes:
        recipe: The recipe fitted to the base, with its data pinned to commits.
        audit: The sizes of the base's parts in memory.
        trained: Numbers of trained tensors and parameters, by group.
        start: The adapter to continue training from; None for a fresh adapter.
        reference: The cost of computing the reference of dpo and kto; None for other objectives.
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
    """Check all of the user's input, read the data, and load the base with its adapter.

    If an `earlier` run is resumed, the recipe may differ from its recipe only in the keys `allow_changed`.
    """
    from transformers import set_seed  # imported here because it imports PEFT, which plans and previews do not need

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
    """Find the recipe's base and the adapter to continue, and check the recipe against both.

    Args:
        weights: Check the base's weights too.
        run: The folder of the run to resume.
    """
    start = find_start(recipe.adapter, run)  # first, so that a damaged adapter is found before a large download
    base = replace(base_model.open_base(recipe.base.model, recipe.base.revision, weights), start=start)
    recipe = base_model.continue_recipe(recipe, base)
    if start:
        warn_of_other_template(start, recipe.data.template, console)
    return base_model.fit_recipe(recipe, base, console), base


def refuse_offload(recipe: Recipe, base: OpenBase, device: str, processes: int = 1) -> None:
    """Refuse a recipe's `base.offload` that the base, the device or the number of processes does not allow."""
    if recipe.base.offload != "none":
        base.architecture.refuse_offload(recipe.base.quantization != "none", device, processes)


def read_data(
    recipe: Recipe, base: OpenBase, earlier: "EarlierRun | None" = None, allow_changed: Sequence[str] = ()
) -> tuple[Recipe, PreTrainedTokenizerFast, RunData]:
    """Pin the recipe's data to commits, and read and tokenise it.

    Returns:
        The recipe with the commits, the base's tokenizer, and the data.

    Raises:
        UserError: The data cannot be used, or the recipe differs from that of the earlier run.
    """
    tokenizer = base.tokenizer(recipe.data.special_tokens)
    recipe = recipe.model_copy(update={"data": pin(recipe.data)})
    if earlier:
        refuse_changes(recipe, earlier.recipe, earlier.folder, allow_changed)
    return recipe, tokenizer, prepare(recipe.data, tokenizer, recipe.train.seed)


def refuse_unknown_metric(train: Train, data: RunData, objective: str) -> None:
    """Raise UserError for early stopping by a metric that the evaluations will not have."""
    languages = sorted(set(data.validation.languages)) if data.validation and objective == "sft" else []
    known = ["eval_loss", *(f"{BY_LANGUAGE}/{code}" for code in languages)]
    if train.early_stopping and train.early_stopping.metric not in known:
        raise UserError(
            f"train.early_stopping.metric: there is no '{train.early_stopping.metric}'. Choose one of "
            f"{', '.join(known)}."
        )


def estimate_steps(recipe: Recipe, tokens: int, sequences: int, processes: int = 1) -> int:
    """Estimate a run's optimiser steps from an epoch's tokens and sequences, assuming perfectly full packed rows."""
    train = recipe.train
    if train.max_steps:
        return train.max_steps
    rows = math.ceil(tokens / recipe.data.max_length) if recipe.data.packing else sequences
    rows_per_step = train.micro_batch_size * train.grad_accum_steps * processes
    return max(1, math.ceil(rows / rows_per_step * train.epochs))


def short_data_line(rows: int, rows_per_step: int) -> str:
    """Return a warning that one step takes more rows than the data has."""
    return (
        f"A step takes {rows_per_step:,} rows (micro batch times accumulation) and the data has {rows:,}: each step is "
        "a whole epoch. Lower train.grad_accum_steps or train.micro_batch_size for more steps per epoch."
    )


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """Return the facts, besides the recipe, that must be unchanged for a run to resume exactly."""
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
    """Return the facts, besides the rows, that the reference's log-probabilities depend on."""
    recipe, start = prepared.recipe, prepared.start
    of_adapter = recipe.train.reference == "adapter" and start is not None
    return {
        "reference": "adapter" if of_adapter else "base",
        "adapter": start.as_dict()["sha256"] if of_adapter and start else "",
        "base": prepared.model.get_base_model().base_fingerprint,
        "quantization": recipe.base.quantization,
        "dtype": str(prepared.precision.dtype),
    }
