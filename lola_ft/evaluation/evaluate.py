"""The verb `lola-ft evaluate` on held-out rows."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lola_ft.console import Console
from lola_ft.data import check_template
from lola_ft.environment import hardware, library_versions
from lola_ft.errors import UserError
from lola_ft.evaluation.ask_models import Opening, ask_each
from lola_ft.evaluation.choice_task import ChoiceTask
from lola_ft.evaluation.comparison import NOTE, Comparison, compare, plot, tables
from lola_ft.evaluation.generate_task import GenerateTask
from lola_ft.evaluation.held_out_rows import RowOptions, read_for_scoring, read_questions
from lola_ft.evaluation.loss_task import LossTask
from lola_ft.evaluation.overlong_prompts import POLICIES
from lola_ft.evaluation.suite.other_model import is_encoder_decoder
from lola_ft.evaluation.task import Measured, Task
from lola_ft.evaluation.transfer import plot_transfer, transfer_dict, transfer_rows, transfer_table
from lola_ft.files import write_text

TASKS = ("loss", "generate", "choice")
_LONGEST_ANSWER = 128
WHY_NOT_ROWS = (
    "its decoder predicts an answer to the encoder's text, so it has no comparable loss or bits per byte of a text. "
    "Compare it on benchmarks with --suite lola-paper."
)


@dataclass(frozen=True)
class TaskOptions:
    """Options of the task, as given on the command line.

    Attributes:
        max_new_tokens: Task `generate`; 128 if None.
        stride: Task `loss`: tokens between windows over texts longer than the model's positions.
        resamples, seed: Number of resamples and random seed of the bootstrap.
        transfer: Also show the effect of training on one language on the other languages.
        overlong: Task `generate`: policy for prompts that are too long; "error" if None.
    """

    task: str = "loss"
    batch_size: int = 8
    max_new_tokens: int | None = None
    stride: int | None = None
    resamples: int = 1000
    seed: int = 0
    transfer: bool = False
    overlong: str | None = None


def evaluate_rows(
    models: Sequence[str],
    rows: RowOptions,
    options: TaskOptions,
    base: str | None = None,
    quantization: str = "auto",
    template: str | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Compare models on held-out rows: print tables, and write numbers as JSON and a plot to a folder."""
    console = console or Console()
    if template:
        check_template(template)
    if encoders := [model for model in models if is_encoder_decoder(model)]:
        raise UserError(f"{encoders[0]}: is an encoder-decoder, which cannot be scored on rows: {WHY_NOT_ROWS}")
    opening = Opening(base, quantization, template)
    trained = transfer_rows(models) if options.transfer else {}
    task = make_task(rows, options)
    if template and isinstance(task, LossTask) and not any(example.prompt for example in task.examples):
        raise UserError("--template does nothing for texts, which have no prompt. Leave it out.")
    prepare = partial(task.prepare, console=console) if isinstance(task, GenerateTask) else None
    measured, facts = ask_each(models, opening, task.run, console, prepare)
    comparison = compare(models, measured, task.measures, task.languages, options.resamples, options.seed)
    for table in tables(comparison):
        console.print(table)
    if trained:
        console.print(transfer_table(comparison, trained))
    console.print(NOTE)
    if out:
        settings = {"rows": asdict(rows), "task": asdict(options)}
        _write(Path(out), task, comparison, measured, {"models": facts, "settings": settings})
        if trained:
            matrix = json.dumps(transfer_dict(comparison, trained), indent=2, ensure_ascii=False)
            write_text(Path(out) / "transfer.json", f"{matrix}\n")
            plot_transfer(comparison, trained, Path(out) / "transfer.png")
        written = f"Written to {out}: {task.name}.json, {task.name}.png, {task.name}_rows.jsonl."
        console.print(written)
    return comparison


def make_task(rows: RowOptions, options: TaskOptions) -> Task:
    """Make a task with its rows; raises UserError for an unknown task, wrong options or rows that cannot be read."""
    if options.task not in TASKS:
        raise UserError(f"--task '{options.task}' is unknown; choose one of {', '.join(TASKS)}.")
    if options.stride is not None and options.task != "loss":
        raise UserError(f"--stride does nothing in --task {options.task}. Leave it out.")
    if options.max_new_tokens is not None and options.task != "generate":
        raise UserError(f"--max-new-tokens does nothing in --task {options.task}. Leave it out.")
    if options.overlong is not None and options.task != "generate":
        raise UserError(f"--overlong does nothing in --task {options.task}, which reads long rows. Leave it out.")
    if options.overlong not in (None, *POLICIES):
        raise UserError(f"--overlong '{options.overlong}' is unknown; choose one of {', '.join(POLICIES)}.")
    if options.transfer and options.task != "loss":
        raise UserError(f"--transfer shows changes in bits per byte, which --task {options.task} does not measure.")
    if options.task == "choice":
        return ChoiceTask(read_questions(rows), options.batch_size)
    examples = read_for_scoring(rows)
    if options.task == "generate":
        longest, overlong = options.max_new_tokens or _LONGEST_ANSWER, options.overlong or "error"
        return GenerateTask(examples, options.batch_size, longest, overlong)
    return LossTask(examples, options.batch_size, options.stride)


def _write(
    folder: Path, task: Task, comparison: Comparison, measured: Sequence[Measured], about: dict[str, Any]
) -> None:
    """Write the numbers, the plot, and each model's result on each row."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"models": about["models"], "results": comparison.as_dict(), "settings": about["settings"]}
    report |= {"versions": library_versions(), "hardware": hardware()}
    if isinstance(task, GenerateTask):
        report["overlong"] = {"policy": task.overlong, "rows": dict(task.too_long)}
    write_text(folder / f"{task.name}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    lines = []
    for place, (where, language) in enumerate(zip(task.places, task.languages, strict=True)):
        by_model = {model: one.rows[place] for model, one in zip(comparison.models, measured, strict=True)}
        lines.append(json.dumps({"where": where, "language": language, "models": by_model}, ensure_ascii=False))
    write_text(folder / f"{task.name}_rows.jsonl", "".join(f"{line}\n" for line in lines))
    plot(comparison, folder / f"{task.name}.png")
