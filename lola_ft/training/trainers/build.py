"""Building a recipe's trainer with its rows and callbacks."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lola_ft.file_names import CHECKPOINTS_FOLDER, METRICS_FILE
from lola_ft.training import processes
from lola_ft.training.callbacks.gradient_check import GradientCheck
from lola_ft.training.callbacks.guards import add_guards
from lola_ft.training.callbacks.longest_batch import LongestBatchFirst
from lola_ft.training.callbacks.progress import Progress
from lola_ft.training.callbacks.resources import EnergyMeter, FreedMemory, PeakMemory
from lola_ft.training.callbacks.stop_request import StopRequest
from lola_ft.training.checkpointing.contents import EvaluationDue
from lola_ft.training.checkpointing.longer import SaysLonger
from lola_ft.training.dataset import training_examples
from lola_ft.training.packing import ready
from lola_ft.training.reports.metrics import MetricsFile
from lola_ft.training.run_state import RunState
from lola_ft.training.setup import Prepared, estimate_steps, facts_of
from lola_ft.training.trainers.arguments import training_arguments
from lola_ft.training.trainers.batch_rows import Document, find_rows
from lola_ft.training.trainers.language_evaluation import rows_by_language
from lola_ft.training.trainers.nonfinite_steps import NonFiniteSteps
from lola_ft.training.trainers.preference import DpoTrainer, KtoTrainer
from lola_ft.training.trainers.run_trainer import RunTrainer
from lola_ft.training.trainers.sft import SftTrainer


def build_trainer(
    prepared: Prepared, output: Path, stop: StopRequest, memory: PeakMemory, say: Callable[[str], None]
) -> RunTrainer:
    """Make the trainer of the recipe's objective; `say` prints a line for the user."""
    recipe, mixed = prepared.recipe, prepared.data.mix
    run = RunState(stop)
    check = GradientCheck(prepared.model)
    training, validation = _rows(prepared)
    kinds: dict[str, type[RunTrainer]] = {"sft": SftTrainer, "dpo": DpoTrainer, "kto": KtoTrainer}
    router_losses = {"aux_loss_coef": recipe.router.aux_loss, "z_loss_coef": recipe.router.z_loss}
    trainer = kinds[recipe.objective](
        model=prepared.model,
        args=training_arguments(
            recipe,
            output / CHECKPOINTS_FOLDER,
            prepared.precision,
            prepared.device,
            steps=estimate_steps(recipe, mixed.tokens, len(mixed.dataset), processes.count()),
            evaluate=prepared.data.validation is not None,
        ),
        train_dataset=training,
        eval_dataset=validation,
        processing_class=prepared.tokenizer,
        **(router_losses if recipe.objective == "sft" else {}),
        run=run,
        nonfinite=NonFiniteSteps(recipe.guards.max_nonfinite, lambda documents: _rows_of(documents, prepared)),
        keep_checkpoints=recipe.train.keep,
        metrics_file=output / METRICS_FILE,
        facts=facts_of(prepared),
        lora_plus_ratio=recipe.train.lora_plus_ratio,
        extended_schedule=recipe.train.extended_schedule,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    # Callbacks act in this order: a line of metrics is written before a guard warns about it.
    metrics = MetricsFile(output / METRICS_FILE, run)
    for callback in (metrics, check, memory, Progress(check, run)):
        trainer.add_callback(callback)
    if prepared.device.type == "cpu":
        trainer.add_callback(FreedMemory())
    if recipe.train.energy and processes.is_main():
        run.kept["energy"] = meter = EnergyMeter(recipe.train.energy.country, run)
        trainer.add_callback(meter)
    add_guards(trainer, recipe, metrics)
    trainer.add_callback(SaysLonger(trainer, say))
    trainer.add_callback(LongestBatchFirst(trainer, recipe.train.optimizer, say))
    trainer.add_callback(EvaluationDue(trainer))
    return trainer


def _rows(prepared: Prepared) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """Return the training rows and the validation rows (None without any), for sft by language."""
    data, section = prepared.data, prepared.recipe.data
    if prepared.recipe.objective != "sft":
        return data.mix.dataset, data.validation.dataset if data.validation else None
    languages = rows_by_language(data.validation.dataset, data.validation.languages) if data.validation else {}
    validation = {code: ready(rows, section.packing, section.max_length) for code, rows in languages.items()}
    return ready(data.mix.dataset, section.packing, section.max_length), validation or None


def _rows_of(documents: list[Document], prepared: Prepared) -> list[str]:
    """Return the places of the rows that the sequences of a batch come from."""
    data = prepared.recipe.data
    examples = training_examples(data)
    return find_rows(documents, examples, prepared.tokenizer, prepared.data.template, data.max_length, data.overlong)
