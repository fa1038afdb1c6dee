"""The reference's log-probabilities, computed once before the first step, so that training itself needs no reference.

They are stored in the run folder, so that a resumed run compares with the same numbers. The training rows are read in
the micro batches of the first epoch. In 16 bit, sums depend on the batch of a row, so only the same micro batches make
the first loss exactly the loss of an unchanged model. A run that ends within its first epoch computes only the rows
that it trains on. If it is made longer, the missing rows are computed then, in the same micro batches.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lola_ft.console import shown_progress
from lola_ft.file_names import REFERENCE_FILE
from lola_ft.files import write_bytes
from lola_ft.training import processes
from lola_ft.training.checkpointing.rng import untouched_rng
from lola_ft.training.trainers.preference import PreferenceTrainer

LogProbs = dict[str, Tensor]
"""Log-probabilities by split (`train`, `validation`): float32 (rows, columns), NaN for rows not needed yet."""


def compute_before_training(
    trainer: PreferenceTrainer, run: Path, made_of: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Add the reference's log-probabilities to the rows of a trainer's data, from the run folder or the model.

    The model must be in its state before training: with an unchanged starting adapter, or with a fresh adapter.

    Args:
        made_of: Facts that the numbers depend on besides the rows. Its `reference` is `adapter` if the model's own
            adapter is the reference, else `base`.
    """
    splits = _splits(trainer)
    wanted = {**made_of, **{name: _digest(dataset) for name, (dataset, _) in splits.items()}}
    file = run / REFERENCE_FILE
    found, seconds, note = processes.on_main(lambda: _read(file, wanted))
    if note:
        say(note)
    columns = trainer.reference_columns
    log_probs = found or {
        name: torch.full((len(dataset), len(columns)), math.nan) for name, (dataset, _) in splits.items()
    }
    missing = {name: _lacking(batches, log_probs[name]) for name, (_, batches) in splits.items()}
    rows = processes.total(sum(len(batch) for batches in missing.values() for batch in batches))
    if rows:
        began = time.perf_counter()
        _fill(trainer, log_probs, missing, of_adapter=made_of["reference"] == "adapter")
        seconds += time.perf_counter() - began
        processes.on_main(lambda: _write(file, log_probs, wanted, seconds))
        say(f"The reference has read {rows:,} rows in {seconds:.1f} s; its log-probabilities are in {file}.")
    trainer.reference_seconds = seconds
    trainer.train_dataset = _with_columns(splits["train"][0], columns, log_probs["train"])
    if "validation" in splits:
        trainer.eval_dataset = _with_columns(splits["validation"][0], columns, log_probs["validation"])
    trainer.precompute_ref_logps = True  # TRL reads the columns from now on


def _splits(trainer: PreferenceTrainer) -> dict[str, tuple[Dataset, list[list[int]]]]:
    """Return the datasets, each with the micro batches of rows that this process needs."""
    with untouched_rng():
        splits = {"train": (trainer.train_dataset, _micro_batches(trainer))}
        if trainer.eval_dataset is not None:
            assert isinstance(trainer.eval_dataset, Dataset), "preferences are evaluated all together"
            splits["validation"] = (trainer.eval_dataset, _of_first_epoch(trainer.get_eval_dataloader()))
    return splits


def _micro_batches(trainer: PreferenceTrainer) -> list[list[int]]:
    """Return the first epoch's micro batches, as many as the run trains on."""
    args, batches = trainer.args, _of_first_epoch(trainer.get_train_dataloader())
    steps_per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return batches[: steps * args.gradient_accumulation_steps]


def _of_first_epoch(loader: Any) -> list[list[int]]:
    """Return the row indices of each micro batch that this process computes in the first epoch."""
    loader.set_epoch(0)
    return list(loader.batch_sampler)


def _lacking(batches: list[list[int]], log_probs: Tensor) -> list[list[int]]:
    return [batch for batch in batches if log_probs[batch].isnan().any()]


def _fill(
    trainer: PreferenceTrainer, log_probs: LogProbs, missing: dict[str, list[list[int]]], of_adapter: bool
) -> None:
    """Compute the missing rows, each process its own micro batches, and store them in all processes."""
    model, datasets = trainer.model, {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    was_training = model.training
    model.eval()  # without dropout
    trainer.ref_model = model if of_adapter else None  # None makes TRL use the model without its adapter
    try:
        rows = sum(len(batch) for batches in missing.values() for batch in batches)
        with shown_progress("Computing the reference", rows, "rows") as progress:
            for name, batches in missing.items():
                own: list[tuple[int, list[float]]] = []
                for batch in batches:
                    own += zip(batch, _of_batch(trainer, datasets[name], batch), strict=True)
                    progress(len(batch))
                for place, numbers in (row for rows in processes.of_all(own) for row in rows):
                    log_probs[name][place] = torch.tensor(numbers)
    finally:
        trainer.ref_model = None
        model.train(was_training)


def _of_batch(trainer: PreferenceTrainer, dataset: Dataset, batch: list[int]) -> list[list[float]]:
    """Return the reference's log-probabilities of each row of a micro batch, in the order of the columns."""
    inputs = send_to_device(trainer.data_collator([dataset[place] for place in batch]), trainer.args.device)
    found = trainer.compute_ref_log_probs(trainer.model, inputs)
    return torch.stack([column.float().cpu() for column in found if column is not None], dim=1).tolist()


def _with_columns(dataset: Dataset, columns: tuple[str, ...], log_probs: Tensor) -> Dataset:
    def add(_rows: dict[str, list[object]], places: list[int]) -> dict[str, list[float]]:
        return {column: log_probs[places, number].tolist() for number, column in enumerate(columns)}

    return dataset.map(add, with_indices=True, batched=True, keep_in_memory=True, load_from_cache_file=False)


def _digest(dataset: Dataset) -> str:
    """Return the SHA-256 of a dataset's token ids, in order."""
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    digest = hashlib.sha256(json.dumps([columns, len(dataset)]).encode())
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        for chunk in (chunk for name in columns for chunk in table[name].chunks):
            digest.update(chunk.value_lengths().to_numpy().tobytes())
            digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()


def _write(file: Path, log_probs: LogProbs, made_of: Mapping[str, str], seconds: float) -> None:
    facts = {"made_of": dict(made_of), "seconds": seconds, "sha256": _sum_of(log_probs)}
    write_bytes(file, save(log_probs, {"facts": json.dumps(facts)}))


def _read(file: Path, made_of: Mapping[str, str]) -> tuple[LogProbs | None, float, str]:
    """Return the stored log-probabilities and their seconds; None and a note if they cannot be used."""
    if not file.is_file():
        return None, 0.0, ""
    try:
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            log_probs = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        if facts["sha256"] != _sum_of(log_probs):
            raise ValueError("it has changed since it was written")
        changed = [name for name, value in made_of.items() if facts["made_of"].get(name) != value]
        seconds = float(facts["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return None, 0.0, f"{file} is damaged ({error}); the reference is computed again."
    if changed:
        return None, 0.0, f"{file} belongs to other inputs ({', '.join(changed)}); the reference is computed again."
    return log_probs, seconds, ""


def _sum_of(log_probs: LogProbs) -> str:
    digest = hashlib.sha256()
    for name in sorted(log_probs):
        digest.update(name.encode() + log_probs[name].numpy().tobytes())
    return digest.hexdigest()
