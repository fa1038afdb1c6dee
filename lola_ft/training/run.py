"""A run, from a recipe to the run folder. Nothing is written before everything the user gave has been checked."""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lola_ft.adapters import fitting_layout
from lola_ft.adapters.loftq import start_at_rounding_error
from lola_ft.baseline.either import add_adapter, load_base, open_checkpoint, save_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import TEMPLATE_FILE
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.environment import library_versions
from lola_ft.errors import UserError
from lola_ft.files import write_text
from lola_ft.memory import keep_freed_memory
from lola_ft.quantization import audit
from lola_ft.recipe import Recipe, render_recipe
from lola_ft.training import processes, run_folder
from lola_ft.training.adapter import adapter_settings
from lola_ft.training.arguments import training_arguments
from lola_ft.training.batch_rows import Document, find_rows
from lola_ft.training.by_language import BY_LANGUAGE, by_language
from lola_ft.training.checkpoint import Checkpoint
from lola_ft.training.data_report import print_report
from lola_ft.training.dataset import pin, prepare, training_examples
from lola_ft.training.energy import EnergyMeter, refuse_without_codecarbon
from lola_ft.training.first_step import FirstStepCheck
from lola_ft.training.fit_base import fit_base
from lola_ft.training.guards import add_guards, refuse_unknown_metric
from lola_ft.training.length import fit_length
from lola_ft.training.lock import lock_folder
from lola_ft.training.longest_batch import LongestBatchFirst, explained_out_of_memory
from lola_ft.training.manifest import Prepared, manifest_of, timings_of
from lola_ft.training.metrics import MetricsFile, read_metrics
from lola_ft.training.optimizers import refuse_missing_optimizer
from lola_ft.training.packing import ready, sequence_lengths, share_of_tokens
from lola_ft.training.peak_memory import PeakMemory
from lola_ft.training.plan import advice
from lola_ft.training.plots import plot_run
from lola_ft.training.precision import choose_precision
from lola_ft.training.preference import DpoTrainer, KtoTrainer
from lola_ft.training.progress import Progress
from lola_ft.training.resumable import ResumableTrainer
from lola_ft.training.resume import (
    EarlierRun,
    find_run,
    refuse_changes,
    refuse_other_facts,
    restart_point,
    rewind_metrics,
    with_stored_commits,
)
from lola_ft.training.routing_results import routing_results
from lola_ft.training.state_file import read_state
from lola_ft.training.steps import estimate_steps
from lola_ft.training.stopping import Stopped, StopRequest
from lola_ft.training.trackers import refuse_missing_trackers
from lola_ft.training.trainables import count_trainable, trainable_table
from lola_ft.training.trainer import LolaTrainer


def train(recipe: Recipe, dry_run: bool = False, resume: bool = False, allow_changed: Sequence[str] = ()) -> Path:
    """Fine-tune as the recipe says; returns the run folder.

    Args:
        dry_run: Do everything but train and write.
        resume: Go on with the run that the output folder holds, if there is one (as `train.resume: auto` does).
        allow_changed: Keys in which the recipe may differ from that run's.

    Raises:
        UserError: For anything in the recipe, the data or the base that cannot work.
        KeyboardInterrupt: Somebody stopped the run; it was saved if it had begun to train.
    """
    device = processes.join()
    console = Console(quiet=not processes.is_main())
    output = Path(recipe.output)
    with StopRequest() as stop, contextlib.ExitStack() as held:
        earlier = processes.on_main(lambda: _earlier_run(recipe, output, resume, allow_changed))
        if earlier and not earlier.finished and not dry_run:
            earlier = processes.on_main(lambda: _locked_run(output, held))
        if earlier and earlier.finished:
            console.print(f"The run in {output} is finished; nothing is left to do.")
            return output
        console.print(_processes_line(recipe), end="")
        began = time.perf_counter()
        prepared = _prepare(recipe, device, console, earlier, allow_changed)
        if dry_run:
            console.print("Dry run: everything is in order; nothing was trained or written.")
            return output
        if earlier is None:
            processes.on_main(lambda: _take_folder(output, held))
        checkpoint = _restart_point(prepared, earlier, allow_changed, console)
        text = render_recipe(prepared.recipe)
        processes.on_main(lambda: write_text(output / run_folder.RECIPE_FILE, text))
        prepare_s = time.perf_counter() - began
        memory = PeakMemory()
        trainer, results = _fit(prepared, output, checkpoint, stop, console, memory)
        resumed_from = checkpoint.step if checkpoint else None
        timings = timings_of(prepare_s, trainer.train_seconds, trainer.tokens_seen, resumed_from)
        measured = {"timings": timings, "memory": memory.as_dict()}
        if isinstance(meter := trainer.kept.get("energy"), EnergyMeter):
            measured["energy"] = meter.as_dict()
        processes.on_main(lambda: _finish(prepared, trainer, output, results, measured))
        processes.leave()
    console.print(f"Done. The adapter is in {output / run_folder.ADAPTER_FOLDER}, the plot in {output / 'loss.png'}.")
    console.print(f"Merge it into the base with: python merge.py {output}")
    return output


def _earlier_run(recipe: Recipe, output: Path, resume: bool, allow_changed: Sequence[str]) -> EarlierRun | None:
    """The run to go on with, if that is wanted and there is one; the recipe is compared with its own."""
    if not resume and recipe.train.resume == "never":
        if allow_changed:
            raise UserError("--allow-changed is for going on with a run. Add --resume, or leave it out.")
        run_folder.refuse_taken(output)
        return None
    earlier = find_run(output)
    if earlier:
        given = with_stored_commits(recipe, earlier.recipe)
        refuse_changes(given, earlier.recipe, output, allow_changed, fitted=False)
    return earlier


def _locked_run(output: Path, held: contextlib.ExitStack) -> EarlierRun | None:
    """The run in the folder, read again once it is locked: who held the lock until now may have finished it."""
    held.enter_context(lock_folder(output))
    return find_run(output)


def _take_folder(output: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder of a new run; whatever it holds is refused."""
    held.enter_context(lock_folder(output))
    run_folder.refuse_taken(output)


def _processes_line(recipe: Recipe) -> str:
    """What a step is, with several processes."""
    micro, accumulated = recipe.train.micro_batch_size, recipe.train.grad_accum_steps
    if processes.count() == 1:
        return ""
    rows = processes.count() * micro * accumulated
    return f"{processes.count()} processes: a step is {processes.count()} x {micro} x {accumulated} = {rows} rows.\n"


def _restart_point(
    prepared: Prepared, earlier: EarlierRun | None, allow_changed: Sequence[str], console: Console
) -> Checkpoint | None:
    """The checkpoint to go on from, with the metrics as they were then."""
    if earlier is None:
        return None

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def find() -> Path | None:
        checkpoint = restart_point(earlier.folder, say)
        if checkpoint:
            refuse_other_facts(checkpoint, _facts(prepared), allow_changed, say)
            say(f"Going on from step {checkpoint.step} ({checkpoint.folder}).")
        else:
            say(f"The run in {earlier.folder} has no checkpoint yet; it starts from its beginning.")
        rewind_metrics(earlier.folder, checkpoint)
        found.append(checkpoint)
        return checkpoint.folder if checkpoint else None

    found = list[Checkpoint | None]()
    folder = processes.on_main(find)
    if folder is None or found:
        return found[0] if found else None
    return Checkpoint(folder, read_state(folder))


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a run to go on exactly, beside the recipe."""
    data = prepared.data.as_dict()
    contents = {**data, "sha256": sorted(data["sha256"].values()), "template": prepared.data.template.source}
    return {
        "base": prepared.model.get_base_model().base_fingerprint,
        "data": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def _prepare(
    recipe: Recipe,
    device: torch.device,
    console: Console,
    earlier: EarlierRun | None = None,
    allow_changed: Sequence[str] = (),
) -> Prepared:
    refuse_missing_trackers(recipe.train.report_to)
    refuse_missing_optimizer(recipe.train.optimizer)
    if recipe.train.energy:
        refuse_without_codecarbon(recipe.train.energy.country)
    precision = choose_precision(recipe.base.dtype, device)
    if precision.note:
        console.print(precision.note)
    checkpoint = open_checkpoint(recipe.base.model, recipe.base.revision)
    recipe = fit_length(fit_base(recipe, checkpoint.config, console), checkpoint.config, console)
    if earlier:
        recipe = with_stored_commits(recipe, earlier.recipe)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    recipe = recipe.model_copy(update={"data": pin(recipe.data)})
    if earlier:
        refuse_changes(recipe, earlier.recipe, earlier.folder, allow_changed)
    data = prepare(recipe.data, tokenizer, recipe.train.seed)
    refuse_unknown_metric(recipe.train, data, recipe.objective)
    print_report(data, console)
    set_seed(recipe.train.seed)
    quantization = None if recipe.base.quantization == "none" else recipe.base.quantization
    base = load_base(
        recipe.base.model, quantization, precision.dtype, device, recipe.base.revision, quiet=console.quiet
    )
    sizes = audit(base).as_dict()
    settings = adapter_settings(recipe)
    model = add_adapter(base, settings)
    if settings.init == "loftq":
        assert isinstance(checkpoint, BaseCheckpoint), "loftq is refused for a dense base"
        console.print(start_at_rounding_error(model, checkpoint))
    trained = count_trainable(model)
    console.print(trainable_table(trained, settings.ranks()))
    return Prepared(recipe, device, precision, tokenizer, data, model, sizes, trained)


def _fit(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
    console: Console,
    memory: PeakMemory,
) -> tuple[LolaTrainer | DpoTrainer | KtoTrainer, dict[str, Any]]:
    recipe, data = prepared.recipe, prepared.data
    metrics = MetricsFile(output / run_folder.METRICS_FILE)
    check = FirstStepCheck(prepared.model)
    kind, own_settings = _trainer_of(prepared)
    training, validation = _datasets(prepared)
    trainer = kind(
        model=prepared.model,
        args=training_arguments(
            recipe,
            output / run_folder.CHECKPOINTS_FOLDER,
            prepared.precision,
            prepared.device,
            steps=estimate_steps(recipe, data.mix.tokens, len(data.mix.dataset), processes.count()),
            evaluate=data.validation is not None,
        ),
        train_dataset=training,
        eval_dataset=validation,
        processing_class=prepared.tokenizer,
        callbacks=[metrics, check, memory],
        **own_settings,
        lora_plus_ratio=recipe.train.lora_plus_ratio,
        stop=stop,
        keep_checkpoints=recipe.train.keep,
        max_nonfinite=recipe.guards.max_nonfinite,
        name_rows=lambda documents: _rows_of(documents, prepared),
        metrics_file=metrics.path,
        facts=_facts(prepared),
    )
    metrics.trainer = trainer
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(check, lambda: trainer.tokens_seen))
    if recipe.train.energy and processes.is_main():
        trainer.kept["energy"] = meter = EnergyMeter(recipe.train.energy.country, lambda: trainer.tokens_seen)
        trainer.add_callback(meter)
    add_guards(trainer, recipe.guards, recipe.train, metrics)
    trainer.add_callback(LongestBatchFirst(trainer, recipe.train.optimizer, console.print))
    console.print(_filling_line(training, prepared))
    if prepared.device.type == "cpu":
        keep_freed_memory()
    with explained_out_of_memory(lambda: advice(recipe, prepared.model.config)):
        try:
            trainer.train_from(checkpoint)
        except Stopped:
            step = trainer.state.global_step
            console.print(
                f"Stopped {f'after step {step}, saved' if step else 'before the first step'}. Go on with --resume."
            )
            raise
        results = {"steps": trainer.state.global_step, "mean_loss": trainer.mean_loss}
        if trainer.skipped.total:
            results["skipped_steps"] = trainer.skipped.total
        if (best := trainer.use_best()) is not None:
            results["best_step"] = best
            console.print(f"The adapter is that of step {best}, the best evaluation.")
        if data.validation:
            results |= _of_evaluation(trainer.evaluate())
    results["tokens"] = trainer.tokens_seen
    return trainer, results


def _rows_of(documents: list[Document], prepared: Prepared) -> list[str]:
    data = prepared.recipe.data
    examples = training_examples(data)
    return find_rows(documents, examples, prepared.tokenizer, prepared.data.template, data.max_length, data.overlong)


def _of_evaluation(metrics: dict[str, float]) -> dict[str, Any]:
    """What of the last evaluation belongs to the results."""
    losses = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{BY_LANGUAGE}/")}
    return {"eval_loss": metrics["eval_loss"]} | ({BY_LANGUAGE: losses} if losses else {})


def _finish(
    prepared: Prepared, trainer: ResumableTrainer, output: Path, results: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Write the adapter with tokenizer and template, the manifest, the plots and the card."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model()

    def write_companions(folder: Path) -> None:
        prepared.tokenizer.save_pretrained(folder)
        (folder / TEMPLATE_FILE).write_text(prepared.data.template.source, encoding="utf-8")

    layout = fitting_layout(model)
    save_adapter(model, output / run_folder.ADAPTER_FOLDER, layout, also=write_companions)
    metrics = read_metrics(output / run_folder.METRICS_FILE)
    if routing := routing_results(metrics):
        results["routing"] = routing
    manifest = manifest_of(prepared, base, results, measured) | {"layout": layout}
    run_folder.write_manifest(output, manifest)
    objective = prepared.recipe.objective
    plot_run(metrics, output, *([] if objective == "sft" else [objective]))
    run_folder.write_card(output, manifest)


def _trainer_of(prepared: Prepared) -> tuple[Any, dict[str, Any]]:
    """The objective's trainer, and what it alone takes."""
    recipe = prepared.recipe
    if recipe.objective == "dpo":
        return DpoTrainer, {}
    if recipe.objective == "kto":
        return KtoTrainer, {}
    return LolaTrainer, {"aux_loss_coef": recipe.router.aux_loss, "z_loss_coef": recipe.router.z_loss}


def _datasets(prepared: Prepared) -> tuple[Any, Any]:
    """What is trained on and what is evaluated, if anything: each language by itself, but preferences all together."""
    data, section = prepared.data, prepared.recipe.data
    if prepared.recipe.objective != "sft":
        return data.mix.dataset, data.validation.dataset if data.validation else None
    languages = by_language(data.validation.dataset, data.validation.languages) if data.validation else {}
    validation = {code: ready(rows, section.packing, section.max_length) for code, rows in languages.items()}
    return ready(data.mix.dataset, section.packing, section.max_length), validation or None


def _filling_line(rows: Any, prepared: Prepared) -> str:
    """How many rows are trained on, and how full of tokens a row or a micro batch is."""
    recipe, mixed = prepared.recipe, prepared.data.mix
    sequences, tokens = len(mixed.dataset), mixed.tokens
    if recipe.data.packing:
        full = tokens / (len(rows) * recipe.data.max_length)
        return f"{sequences:,} sequences are packed into {len(rows):,} rows, {full:.1%} full."
    line = f"{sequences:,} sequences, {tokens / sequences:.0f} tokens each on average, not packed"
    if recipe.objective != "sft":
        return f"{line}."
    micro = recipe.train.micro_batch_size
    share = share_of_tokens(sequence_lengths(rows), micro, recipe.train.seed)
    return f"{line}. Of micro batches of {micro}, {share:.1%} is tokens and not padding."
