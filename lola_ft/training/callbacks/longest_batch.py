"""A trial of the longest micro batch before the first step, so that a lack of memory shows at once, not hours later.

The trial leaves no trace: training computes bit for bit the same as without it.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import TrainerCallback

from lola_ft.errors import UserError
from lola_ft.planning.optimizer import optimizer_bytes
from lola_ft.training.checkpointing.rng import untouched_rng
from lola_ft.training.packing import sequence_lengths

if TYPE_CHECKING:
    from datasets import Dataset

    from lola_ft.training.trainers.run_trainer import RunTrainer

_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
)  # messages: torch has no special error on a CPU
_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


class LongestBatchFirst(TrainerCallback):
    """Tries the longest micro batch when training begins."""

    def __init__(self, trainer: "RunTrainer", optimizer: str, say: Callable[[str], None]) -> None:
        self._trainer, self._optimizer, self._say = trainer, optimizer, say

    def on_train_begin(self, *_: object, **__: object) -> None:
        tokens = try_longest_batch(self._trainer, self._optimizer)
        self._say(f"The longest micro batch, {tokens:,} tokens, fits into memory.")


def try_longest_batch(trainer: "RunTrainer", optimizer: str) -> int:
    """Do one forward and backward pass of the longest rows; returns their tokens, including padding.

    Memory is reserved for the optimiser's state, which does not exist before the first step. Gradients are dropped;
    random number generators, counts and metrics are restored.
    """
    dataset, args = trainer.train_dataset, trainer.args
    places = longest_rows(dataset, args.per_device_train_batch_size, args.train_sampling_strategy == "sequential")
    numels = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
    state = optimizer_bytes(optimizer, numels, args.device.type == "cuda").state
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # the loop sets it later
    with untouched_rng(), _untouched_counts(trainer):
        inputs = trainer.data_collator([dataset[place] for place in places])
        tokens = inputs["input_ids"].numel()
        missing = 0 if trainer.optimizer and trainer.optimizer.state else state
        room = torch.empty(missing, dtype=torch.uint8, device=args.device)
        try:
            trainer.training_step(trainer.model_wrapped, inputs, tokens)
        finally:
            del room
            trainer.model.zero_grad(set_to_none=True)
            trainer.nonfinite.forget_micro_batches()
    return tokens


@contextlib.contextmanager
def _untouched_counts(trainer: "RunTrainer") -> Iterator[None]:
    """Restore the counts of tokens, the metrics and the experts' load after the block."""
    run = trainer.run
    tokens = run.tokens_seen, run.own_tokens, trainer._total_train_tokens
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    load = getattr(trainer, "router_load", None)  # trainers of dpo and kto have none
    load_ME = None if load is None else load.counts_ME.clone()
    try:
        yield
    finally:
        run.tokens_seen, run.own_tokens, trainer._total_train_tokens = tokens
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)
        if load is not None:
            load.counts_ME.copy_(load_ME)


def longest_rows(dataset: "Dataset", count: int, in_order: bool = False) -> list[int]:
    """Return the indices of the `count` longest rows, longest first; all rows if there are fewer.

    With `in_order`, micro batches are consecutive rows, as KTO's are, and the longest such batch is returned.
    """
    lengths = _lengths(dataset)
    if not in_order:
        return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)
    batches = [range(start, min(start + count, len(lengths))) for start in range(0, len(lengths), count)]
    sizes = [len(batch) * max(lengths[place] for place in batch) for batch in batches]
    return list(batches[sizes.index(max(sizes))])


def _lengths(dataset: "Dataset") -> list[int]:
    """Return the number of tokens per row; for judged answers, of the prompt with its longest answer."""
    answers = [sequence_lengths(dataset, name) for name in _ANSWERS if name in dataset.column_names]
    if not answers:
        return sequence_lengths(dataset).tolist()
    return (sequence_lengths(dataset, "prompt_ids") + np.maximum.reduce(answers)).tolist()


@contextlib.contextmanager
def explained_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a UserError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise UserError(f"Training ran out of memory.\n{advice()}") from error
