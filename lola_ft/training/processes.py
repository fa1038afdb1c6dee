"""Several processes in one run: one prints and writes, all learn the same. accelerate starts and connects them.

Each process has the whole base and a copy of the adapter, and adds its gradients to the others' (DDP).
"""

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import KwargsHandler, broadcast_object_list, gather_object, reduce

from lola_ft.errors import UserError

T = TypeVar("T")

_ENGINES = {
    "ACCELERATE_USE_FSDP": (
        "FSDP",
        "it cuts weights and the optimiser's state into pieces; a 4-bit stack of experts cannot be cut, and "
        "checkpoints here hold all of them whole",
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "it takes over optimiser and checkpoints, which would not resume exactly",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it brings model classes of its own, and LOLA is none of them"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("accelerate's parallelism", "it cuts weights or sequences into pieces"),
}
_TIMEOUT = timedelta(hours=1)  # how long one process waits for another


def join() -> torch.device:
    """Connect with the processes that a launcher has started, if it did; returns this process's device."""
    for variable, (name, reason) in _ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"accelerate is set to {name}: {reason}. In 4 bit the whole base fits on each GPU, so choose plain "
                "data parallelism: `accelerate launch --multi_gpu finetune.py RECIPE`."
            )
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cpu" if cpu else "cuda")
    return PartialState(cpu=cpu, timeout=_TIMEOUT).device


def leave_environment(handler: KwargsHandler) -> None:
    """Let accelerate see what a handler changes without emptying the environment, as it does (1.15) to see defaults.

    A native thread that reads a variable meanwhile, for which it needs no lock of Python's, can end the process.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(handler)}
    given = {name: value for name, value in handler.to_dict().items() if value != defaults[name]}
    handler.to_kwargs = lambda: dict(given)


def leave() -> None:
    """Part from the other processes, when all are done."""
    if count() > 1:
        PartialState().destroy_process_group()


def count() -> int:
    """Return how many processes there are."""
    return torch.distributed.get_world_size() if _connected() else 1


def index() -> int:
    """Return this process's number, from 0."""
    return torch.distributed.get_rank() if _connected() else 0


def is_main() -> bool:
    """Say whether this process is the one that prints and writes."""
    return index() == 0


def on_main(action: Callable[[], T]) -> T:
    """Let the main process do something while the others wait.

    Returns:
        What the action returned, in every process.

    Raises:
        UserError, KeyboardInterrupt: What the action raised, in every process.
    """
    if count() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except (UserError, KeyboardInterrupt) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def total(number: int) -> int:
    """Sum a number of each process over all of them."""
    if count() == 1:
        return number
    return int(reduce(torch.tensor(int(number), device=PartialState().device), reduction="sum"))


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor of each process over all of them."""
    return reduce(tensor, reduction="sum") if count() > 1 else tensor


def of_all(value: T) -> list[T]:
    """Return every process's value, in the processes' order."""
    return list(gather_object([value])) if count() > 1 else [value]


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
