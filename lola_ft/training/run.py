"""A run, from a recipe to the run folder. Nothing is written before all of the user's input has been checked.

`setup.py` prepares the run, `trainers/build.py` makes its trainer, and `checkpointing/resume.py` finds the checkpoint
to resume from.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lola_ft.console import Console
from lola_ft.families import architecture_of
from lola_ft.file_names import ADAPTER_FOLDER, METRICS_FILE, RECIPE_FILE
from lola_ft.files import write_text
from lola_ft.memory import keep_freed_memory
from lola_ft.recipe import Recipe, render_recipe
from lola_ft.training import processes, run_folder
from lola_ft.training.base_model import save_adapter
from lola_ft.training.callbacks.longest_batch import explained_out_of_memory
from lola_ft.training.callbacks.resources import EnergyMeter, PeakMemory
from lola_ft.training.callbacks.stop_request import Stopped, StopRequest
from lola_ft.training.checkpointing.checkpoint import Checkpoint
from lola_ft.training.checkpointing.resume import earlier_run, find_restart, lock_run
from lola_ft.training.packing import filling_line
from lola_ft.training.plan import advice
from lola_ft.training.reports.manifest import manifest_of, routing_results, timings_of, write_card, write_manifest
from lola_ft.training.reports.metrics import BY_LANGUAGE, losses_by_language, read_metrics
from lola_ft.training.reports.plots import plot_run
from lola_ft.training.reports.run_page import write_run_page
from lola_ft.training.reports.summary_box import print_summary
from lola_ft.training.setup import Prepared, facts_of, prepare_run, reference_facts, short_data_line
from lola_ft.training.starting_adapter import keep_start
from lola_ft.training.trainers.build import build_trainer
from lola_ft.training.trainers.preference import PreferenceTrainer
from lola_ft.training.trainers.reference_pass import compute_before_training
from lola_ft.training.trainers.run_trainer import RunTrainer


def train(recipe: Recipe, dry_run: bool = False, resume: bool = False, allow_changed: Sequence[str] = ()) -> Path:
    """Fine-tune a base model with a recipe; returns the run folder.

    Args:
        dry_run: Do everything except training and writing.
        resume: Resume the run in the output folder if there is one (like `train.resume: auto`).
        allow_changed: Keys in which the recipe may differ from the resumed run's recipe.

    Raises:
        UserError: Something in the recipe, the data or the base cannot work.
        KeyboardInterrupt: The run was stopped. It was saved if training had begun.
    """
    device = processes.join()
    console = Console(quiet=not processes.is_main())
    output = Path(recipe.output)
    with StopRequest() as stop, contextlib.ExitStack() as held:
        earlier = processes.on_main(lambda: earlier_run(recipe, resume, allow_changed))
        if earlier and not earlier.finished and not dry_run:
            earlier = processes.on_main(lambda: lock_run(recipe, held))
        if earlier and earlier.finished:
            console.print(f"The run in {output} is finished; nothing is left to do.")
            return output
        processes.on_main(lambda: run_folder.refuse_unwritable(output))
        if (count := processes.count()) > 1:
            micro, accumulated = recipe.train.micro_batch_size, recipe.train.grad_accum_steps
            rows = count * micro * accumulated
            console.print(f"{count} processes: a step has {count} x {micro} x {accumulated} = {rows} rows.")

        began = time.perf_counter()
        prepared = prepare_run(recipe, device, console, earlier, allow_changed)
        if dry_run:
            console.print("Dry run: all checks passed; nothing was trained or written.")
            return output
        if earlier is None:
            processes.on_main(lambda: _begin(prepared, output, held))
        facts, wanted = facts_of(prepared), prepared.recipe
        checkpoint = find_restart(earlier, wanted, facts, allow_changed, console) if earlier else None
        text = render_recipe(prepared.recipe)
        processes.on_main(lambda: write_text(output / RECIPE_FILE, text))
        prepare_s = time.perf_counter() - began

        memory = PeakMemory()
        trainer, results = _fit(prepared, output, checkpoint, stop, console, memory)
        timings = timings_of(
            prepare_s, trainer.run.train_seconds, trainer.run.tokens_seen, checkpoint.step if checkpoint else None
        )
        if isinstance(trainer, PreferenceTrainer) and trainer.reference_seconds:
            timings["reference_s"] = round(trainer.reference_seconds, 1)
        measured = {"timings": timings, "memory": memory.as_dict()}
        if isinstance(meter := trainer.run.kept.get("energy"), EnergyMeter):
            measured["energy"] = meter.as_dict()
        processes.on_main(lambda: _finish(prepared, trainer, output, results, measured))
        processes.on_main(lambda: print_summary(output, console))
        processes.leave()
    return output


def _begin(prepared: Prepared, output: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder of a new run, and copy its starting adapter into the folder."""
    run_folder.take_folder(output, held)
    if prepared.start:
        keep_start(prepared.start, output)


def _fit(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
    console: Console,
    memory: PeakMemory,
) -> tuple[RunTrainer, dict[str, Any]]:
    """Train from a checkpoint or from the beginning, and evaluate the final adapter; returns trainer and results."""
    trainer = build_trainer(prepared, output, stop, memory, console.print)
    console.print(filling_line(trainer.train_dataset, prepared.data, prepared.recipe))
    settings, rows = prepared.recipe.train, len(trainer.train_dataset)
    rows_per_step = processes.count() * settings.micro_batch_size * settings.grad_accum_steps
    if rows < rows_per_step:
        console.print(short_data_line(rows, rows_per_step))
    if prepared.device.type == "cpu":
        keep_freed_memory()
    with explained_out_of_memory(lambda: advice(prepared.recipe, architecture_of(prepared.model.config))):
        if prepared.recipe.train.reference_pass == "before":
            assert isinstance(trainer, PreferenceTrainer), "only preferences have a reference"
            compute_before_training(trainer, output, reference_facts(prepared), console.print)
        try:
            trainer.train_from(checkpoint)
        except Stopped:
            step = trainer.state.global_step
            console.print(
                f"Stopped {f'after step {step}, saved' if step else 'before the first step'}. Go on with --resume."
            )
            raise
        results = {"steps": trainer.state.global_step, "mean_loss": trainer.nonfinite.mean_loss}
        if trainer.nonfinite.skipped.total:
            results["skipped_steps"] = trainer.nonfinite.skipped.total
        if (best := trainer.use_best()) is not None:
            results["best_step"] = best
            console.print(f"The adapter is the one of step {best}, which had the best evaluation.")
        if prepared.data.validation:
            results |= _of_evaluation(trainer.evaluate())
    results["tokens"] = trainer.run.tokens_seen
    return trainer, results


def _of_evaluation(metrics: dict[str, float]) -> dict[str, Any]:
    """Return the losses of the last evaluation, for the results."""
    losses = losses_by_language(metrics)
    return {"eval_loss": metrics["eval_loss"]} | ({BY_LANGUAGE: losses} if losses else {})


def _finish(
    prepared: Prepared, trainer: RunTrainer, output: Path, results: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Write the adapter with tokenizer and template, the manifest, the plots, the report and the card, the last."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = output / ADAPTER_FOLDER
    layout = save_adapter(model, adapter, prepared.tokenizer, prepared.data.template)
    metrics = read_metrics(output / METRICS_FILE)
    if routing := routing_results(metrics):
        results["routing"] = routing
    manifest = manifest_of(prepared, model.get_base_model(), results, measured) | {"layout": layout}
    if trainer.run.extensions:
        manifest["extensions"] = trainer.run.extensions
    write_manifest(output, manifest)
    objective = prepared.recipe.objective
    plot_run(metrics, output, *([] if objective == "sft" else [objective]))
    write_run_page(output, manifest, metrics)
    write_card(output, manifest)
