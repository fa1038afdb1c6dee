"""The longest micro batch is tried before the first step: memory that is not enough is missed at once, not at night.

On a GPU alone: a CPU's memory seldom ends there, and its steps are slow. Nothing of the trial is left: training goes on
bit for bit as without it.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from lola_ft.errors import UserError
from lola_ft.planning.optimizer import optimizer_bytes
from lola_ft.training.packing import sequence_lengths
from lola_ft.training.rng import untouched_rng

if TYPE_CHECKING:
    from datasets import Dataset

    from lola_ft.training.trainer import LolaTrainer

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch on a CPU has no error of its own


class LongestBatchFirst(TrainerCallback):
    """Tries the longest micro batch when training begins, on a GPU."""

    def __init__(self, trainer: "LolaTrainer", optimizer: str) -> None:
        """Args: the trainer; the recipe's name of its optimiser, whose state the trial leaves room for."""
        self._trainer, self._optimizer = trainer, optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if is_wanted(args.device):
            try_longest_batch(self._trainer, self._optimizer)


def is_wanted(device: torch.device) -> bool:
    """Whether the longest batch is tried on this device."""
    return device.type == "cuda"


def try_longest_batch(trainer: "LolaTrainer", optimizer: str) -> int:
    """One forward and backward pass of the longest rows; returns their tokens, padding included.

    Room is left for the optimiser's state, which does not exist before the first step. Gradients are dropped; random
    numbers, counts and metrics are as before.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    dataset = trainer.train_dataset
    rows = [dataset[place] for place in longest_rows(dataset, trainer.args.per_device_train_batch_size)]
    numels = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
    device = trainer.args.device
    state = optimizer_bytes(optimizer, numels, device.type == "cuda").state
    counted, metrics = trainer.tokens_seen, {name: list(values) for name, values in trainer._metrics["train"].items()}
    load_ME = None if trainer.router_load is None else trainer.router_load.counts_ME.clone()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # the loop sets it later
    with untouched_rng():
        inputs = trainer.data_collator(rows)
        tokens = inputs["input_ids"].numel()
        room = torch.empty(
            0 if trainer.optimizer and trainer.optimizer.state else state, dtype=torch.uint8, device=device
        )
        try:
            trainer.training_step(trainer.model_wrapped, inputs, tokens)
        finally:
            del room
            trainer.model.zero_grad(set_to_none=True)
            trainer.forget_micro_batches()
    trainer.tokens_seen, trainer.own_tokens = counted, 0
    if trainer.router_load is not None and load_ME is not None:
        trainer.router_load.counts_ME.copy_(load_ME)
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update(metrics)
    return tokens


def longest_rows(dataset: "Dataset", count: int) -> list[int]:
    """Places of the longest rows, the longest first; all of them if there are fewer."""
    lengths = sequence_lengths(dataset).tolist()
    return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)


@contextlib.contextmanager
def explained_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory into a message with advice.

    Raises:
        UserError: The block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise UserError(f"Training ran out of memory.\n{advice()}") from error
