"""Evaluation by language: one loss for each, and their mean over all trained tokens.

Each language's rows are evaluated apart, so that no batch and no packed row holds two. Losses are sums over tokens,
divided at the end: they do not depend on how rows are packed or put into batches.
"""

import time
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import Trainer

from lola_ft.training import processes
from lola_ft.training.rng import untouched_rng

BY_LANGUAGE = "eval_loss_by_language"


class EvaluatesLanguages(Trainer):
    """Goes in front of a trainer class whose `eval_dataset` is a dictionary of datasets by language code."""

    control: Any
    _sums = torch.zeros(2)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if args or kwargs.get("eval_dataset") is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(*args, **kwargs)
        with untouched_rng():
            return self._evaluate_languages(self.eval_dataset)

    def _evaluate_languages(self, datasets: dict[str, Dataset]) -> dict[str, float]:
        began, rows, batches = time.perf_counter(), 0, 0
        sums: dict[str, Tensor] = {}
        for code, dataset in datasets.items():
            self._sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            loader = self.get_eval_dataloader(self._evened(dataset))
            self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True)
            sums[code] = self.accelerator.reduce(self._sums, reduction="sum")
            rows, batches = rows + len(dataset), batches + len(loader)
        losses = {code: (total / labels.clamp(min=1)).item() for code, (total, labels) in sums.items()}
        total, labels = torch.stack(list(sums.values())).sum(dim=0)
        metrics = {"eval_loss": (total / labels.clamp(min=1)).item()}
        metrics |= {f"{BY_LANGUAGE}/{code}": loss for code, loss in losses.items()}
        seconds = time.perf_counter() - began  # not speed_metrics, which asks the clock, and that may jump
        metrics |= {
            "eval_runtime": round(seconds, 4),
            "eval_samples_per_second": round(rows / seconds, 3),
            "eval_steps_per_second": round(batches / seconds, 3),
        }
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evened(self, dataset: Dataset) -> Dataset:
        """With rows that count nothing at the end, so that no row is there twice: processes get equally many."""
        missing = -len(dataset) % (processes.count() * self.args.per_device_eval_batch_size)
        if processes.count() == 1 or not missing:
            return dataset
        blank = dataset.select([0]).map(_unlabelled, keep_in_memory=True, load_from_cache_file=False)
        return concatenate_datasets([dataset, blank.cast(dataset.features).select([0] * missing)])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total = self.compute_loss(model, inputs, num_items_in_batch=torch.ones((), device=self.args.device))
        labels = (inputs["labels"][:, 1:] != -100).sum()
        self._sums += torch.stack([total.double(), labels.double()])
        return total / labels.clamp(min=1), None, None


def _unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [-100] * len(row["labels"])}


def by_language(dataset: Dataset, languages: list[str]) -> dict[str, Dataset]:
    """A dataset's rows by language code, in alphabetical order of the codes."""
    places: dict[str, list[int]] = {}
    for place, code in enumerate(languages):
        places.setdefault(code, []).append(place)
    return {code: dataset.select(places[code]) for code in sorted(places)}
