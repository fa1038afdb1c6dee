"""`lola-ft plan`: predict a recipe's memory, steps and file sizes from the base's config and the data."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lola_ft.console import Console
from lola_ft.families import Architecture
from lola_ft.planning import Change, Job, Prediction, first_fit, parse_size, predict, show_size
from lola_ft.planning.merged_sizes import merged_files
from lola_ft.planning.prediction_tables import memory_lines, memory_table, shape, verdict
from lola_ft.recipe import Recipe
from lola_ft.recipe.allowed_values import OBJECTIVE_FORMATS
from lola_ft.recipe.preference_rules import LEAST_MICRO_BATCH
from lola_ft.training.base_model import OpenBase, adapter_settings
from lola_ft.training.precision import choose_precision
from lola_ft.training.reference_choice import choose_reference_pass
from lola_ft.training.setup import estimate_steps, fit_to_base, read_data, refuse_offload, short_data_line

if TYPE_CHECKING:
    from datasets import Dataset

_OUT_OF_MEMORY_SHARE = 0.9  # after running out of memory, advise at most this share of the predicted memory


@dataclass(frozen=True)
class DataFacts:
    """The sizes of an epoch of a recipe's training data: numbers of tokens and of sequences."""

    tokens: int
    sequences: int
    longest: int
    validation_rows: int = 0


def plan(recipe: Recipe, gpu: str | None, as_json: bool, with_data: bool = True) -> None:
    """Print a recipe's peak memory by part, its steps, the sizes of its files, and changes that would make it fit.

    Args:
        gpu: Memory of a GPU, such as `8GB`; None for this machine's GPU or, without one, its CPU.
        as_json: Print one JSON object.
        with_data: Read local data for the number of steps and the longest row.

    Raises:
        UserError: `gpu` is not a size, the base has no config, or the data cannot be used.
    """
    console = Console()
    device, limit = target_machine(gpu)
    recipe, base = fit_to_base(recipe, Console(stderr=True))
    refuse_offload(recipe, base, device)
    facts, notes = _facts_of_data(recipe, base) if with_data else (None, ["The data was not read (--no-data)."])
    steps = estimate_steps(recipe, facts.tokens, facts.sequences) if facts else recipe.train.max_steps
    rows, held_out = (facts.sequences, facts.validation_rows) if facts else (None, 0)
    recipe, passes = choose_reference_pass(recipe, base, rows, held_out, steps or 0)
    job = job_of(recipe, base.trained_architecture(recipe), device, facts.longest if facts else None)
    prediction = predict(job)
    change = None if prediction.total <= limit else first_fit(job, limit)
    merged = merged_files(base.folder, job.architecture)
    chosen = recipe.train.reference_pass if recipe.train.reference_pass != "auto" else None
    if as_json:
        found = _as_dict(prediction, limit, change, steps, facts, merged) | {"notes": notes}
        print(json.dumps(found | ({"reference_pass": passes.as_dict(chosen)} if passes else {}), indent=2))
        return
    console.print(memory_table(prediction))
    sizes = f"{show_size(prediction.fixed.adapter_file)} on disk, the merged model {show_size(sum(merged.values()))}"
    lengths = [*_length_lines(job, steps, facts, notes), *([passes.line(chosen)] if passes else [])]
    lengths += [prediction.offloading.line()] if prediction.offloading else []
    for line in [*lengths, f"The adapter takes {sizes}.", *verdict(prediction, limit, change)]:
        console.print(line)


def advice(recipe: Recipe, architecture: Architecture, longest: int | None = None) -> str:
    """Return advice for a run that ran out of memory: its memory by part, and overrides that need less."""
    device, limit = target_machine(None)
    job = job_of(recipe, architecture, device, longest)
    prediction = predict(job)
    change = first_fit(job, min(limit, int(_OUT_OF_MEMORY_SHARE * prediction.total)))
    lines = [f"{shape(job)} need about:", *memory_lines(prediction), f"There are {show_size(limit)} in all."]
    if prediction.total <= limit:
        lines.append("That should fit, so other programs may be using memory too.")
    if change is None:
        return "\n".join([*lines, "No smaller batch, length or rank would help."])
    needs = show_size(change.prediction.total)
    return "\n".join(
        [
            *lines,
            f"Add this to the command, with another `output` (it needs {needs}):",
            f"  {' '.join(change.overrides)}",
        ]
    )


def target_machine(gpu: str | None) -> tuple[str, int]:
    """Return `cuda` or `cpu`, and its memory in bytes."""
    if gpu is not None:
        return "cuda", parse_size(gpu)
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    return "cpu", psutil.virtual_memory().total


def job_of(recipe: Recipe, architecture: Architecture, device: str, longest: int | None = None) -> Job:
    """Return the planner's input for a recipe; `longest` is the number of tokens of the longest row, if known."""
    train, router = recipe.train, recipe.router
    dtype: str = recipe.base.dtype
    if device == "cpu" or torch.cuda.is_available():
        dtype = str(choose_precision(dtype, torch.device(device)).dtype).removeprefix("torch.")
    return Job(
        architecture=architecture,
        settings=adapter_settings(recipe),
        quantization=None if recipe.base.quantization == "none" else recipe.base.quantization,
        dtype=dtype,
        device=device,
        micro_batch_size=train.micro_batch_size,
        grad_accum_steps=train.grad_accum_steps,
        length=min(longest or recipe.data.max_length, recipe.data.max_length),
        packing=recipe.data.packing,
        checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer,
        router_losses=(router.aux_loss > 0) + (router.z_loss > 0),
        offload=recipe.base.offload == "experts",
        base_dropout=recipe.objective not in OBJECTIVE_FORMATS,
        row_sequences=2 if recipe.objective == "dpo" else 1,
        continues=recipe.adapter.continue_from is not None,
        reference=(recipe.train.reference, recipe.train.reference_pass) == ("adapter", "beside"),
        least_micro_batch=LEAST_MICRO_BATCH.get(train.loss_type or "", 1),
    )


def _facts_of_data(recipe: Recipe, base: OpenBase) -> tuple[DataFacts | None, list[str]]:
    """Return the data's sizes and notes about it; None and the reason if it cannot be read."""
    data = recipe.data
    validation = data.validation if isinstance(data.validation, list) else []
    if remote := [source.hub for source in [*data.sources, *validation] if source.hub]:
        return None, [f"The data was not read: {remote[0]} is on the Hub."]
    if not any(base.folder.glob("tokenizer*")):
        return None, [f"The data was not read: {base.folder} holds no tokenizer."]
    read = read_data(recipe, base)[2]
    mixed = read.mix
    longest = mixed.tokens if data.packing else _longest(mixed.dataset)
    held_out = len(read.validation.dataset) if read.validation else 0
    facts = DataFacts(mixed.tokens, len(mixed.dataset), min(longest, data.max_length), held_out)
    return facts, read.findings_lines()


def _longest(dataset: "Dataset") -> int:
    """Return the tokens of the longest sequence. A pair counts as two sequences with the same prompt."""
    if "chosen_ids" not in dataset.column_names:
        return max(len(ids) for ids in dataset["input_ids"])
    answers = zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return max(len(prompt) + max(map(len, pair)) for prompt, pair in zip(dataset["prompt_ids"], answers, strict=True))


def _length_lines(job: Job, steps: int | None, facts: DataFacts | None, notes: list[str]) -> list[str]:
    tokens = _tokens_per_step(job, facts)
    count = f"{steps:,} steps" if steps else "An unknown number of steps"
    lines = [f"{count} of about {tokens:,} tokens each ({job.grad_accum_steps} times {shape(job)})."]
    if facts:
        lines.append(f"An epoch has {facts.sequences:,} sequences, {facts.tokens:,} tokens.")
        step = job.micro_batch_size * job.grad_accum_steps
        rows = -(-facts.tokens // job.length) if job.packing else facts.sequences
        lines += [short_data_line(rows, step)] * (rows < step)
    return lines + notes


def _tokens_per_step(job: Job, facts: DataFacts | None) -> int:
    """Estimate the tokens per step: full rows if packed or if the data is unknown, else rows of average length."""
    rows = job.micro_batch_size * job.grad_accum_steps
    if facts and not job.packing:
        return round(rows * facts.tokens / facts.sequences)
    return rows * job.length


def _as_dict(
    prediction: Prediction,
    limit: int,
    change: Change | None,
    steps: int | None,
    facts: DataFacts | None,
    merged: dict[str, int],
) -> dict[str, Any]:
    job = prediction.job
    suggestion = change and {"overrides": list(change.overrides), **change.prediction.as_dict()}
    return {
        "device": job.device,
        "dtype": job.dtype,
        "limit_bytes": limit,
        "fits": prediction.total <= limit,
        **prediction.as_dict(),
        "tokens_per_step": _tokens_per_step(job, facts),
        "steps": steps,
        "epoch": facts and {"sequences": facts.sequences, "tokens": facts.tokens, "longest": facts.longest},
        "adapter_file_bytes": prediction.fixed.adapter_file,
        "merged_file_bytes": merged,
        "suggestion": suggestion,
    }
