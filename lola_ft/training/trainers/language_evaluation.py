"""Evaluation by language: the loss of each language, and the mean over all trained tokens.

Each language's rows are evaluated separately, so no batch and no packed row mixes languages. Losses are summed over
tokens and divided at the end, so they do not depend on how rows are packed or batched.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from lola_ft.training import processes
from lola_ft.training.reports.metrics import BY_LANGUAGE

if TYPE_CHECKING:
    from lola_ft.training.trainers.sft import SftTrainer


def rows_by_language(dataset: Dataset, languages: list[str]) -> dict[str, Dataset]:
    """Return a dataset's rows by language code, in alphabetical order of the codes."""
    places: dict[str, list[int]] = {}
    for place, code in enumerate(languages):
        places.setdefault(code, []).append(place)
    return {code: dataset.select(places[code]) for code in sorted(places)}


def evaluate_languages(trainer: "SftTrainer", datasets: dict[str, Dataset]) -> dict[str, float]:
    """Evaluate each language's rows; returns the metrics without logging them."""
    began, rows, batches = time.perf_counter(), 0, 0
    sums: dict[str, Tensor] = {}
    for code, dataset in datasets.items():
        trainer.loss_sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        loader = trainer.get_eval_dataloader(_evened(dataset, trainer.args.per_device_eval_batch_size))
        trainer.evaluation_loop(loader, "Evaluation", prediction_loss_only=True)
        sums[code] = trainer.accelerator.reduce(trainer.loss_sums, reduction="sum")
        rows, batches = rows + len(dataset), batches + len(loader)
    losses = {code: (total / labels.clamp(min=1)).item() for code, (total, labels) in sums.items()}
    total, labels = torch.stack(list(sums.values())).sum(dim=0)
    seconds = time.perf_counter() - began  # not transformers' speed_metrics, which reads a clock that may jump
    return {
        "eval_loss": (total / labels.clamp(min=1)).item(),
        **{f"{BY_LANGUAGE}/{code}": loss for code, loss in losses.items()},
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": round(rows / seconds, 3),
        "eval_steps_per_second": round(batches / seconds, 3),
    }


def sum_of_batch(trainer: "SftTrainer", model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return a batch's sum of losses and its number of labels (2,), float64."""
    with torch.no_grad(), trainer.compute_loss_context_manager():
        one = torch.ones((), device=trainer.args.device)
        total = trainer.compute_loss(model, inputs, num_items_in_batch=one)
    assert isinstance(total, Tensor), "the outputs were not asked for"
    labels = (inputs["labels"][:, 1:] != -100).sum()
    return torch.stack([total.double(), labels.double()])


def _evened(dataset: Dataset, batch_size: int) -> Dataset:
    """Add rows that count nothing at the end: processes get equally many rows, and none is evaluated twice."""
    missing = -len(dataset) % (processes.count() * batch_size)
    if processes.count() == 1 or not missing:
        return dataset
    blank = dataset.select([0]).map(
        lambda row: {"labels": [-100] * len(row["labels"])}, keep_in_memory=True, load_from_cache_file=False
    )
    return concatenate_datasets([dataset, blank.cast(dataset.features).select([0] * missing)])
