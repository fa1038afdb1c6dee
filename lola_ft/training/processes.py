"""Several processes in one run, started and connected by accelerate. Only the main process prints and writes.

Each process has the whole base and a copy of the adapter. An all-reduce averages the adapter's gradients (DDP), so the
copies stay equal.
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
        "it shards weights and the optimiser's state, but a 4-bit stack of experts cannot be sharded, and "
        "checkpoints of lola_ft are not sharded",
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "it replaces optimiser and checkpoints, so a run would not resume exactly",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it has its own model classes, and LOLA is not among them"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("accelerate's parallelism", "it shards weights or sequences"),
}
_TIMEOUT = timedelta(hours=1)  # longest time that one process waits for another


def join() -> torch.device:
    """Connect with the other processes of a launcher, if there are any; returns this process's device."""
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
    """Give a handler a `to_kwargs` that does not touch the environment.

    accelerate (1.15) empties the environment for a moment to find a handler's defaults. A native thread that reads an
    environment variable at that moment can crash the process.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(handler)}
    given = {name: value for name, value in handler.to_dict().items() if value != defaults[name]}
    handler.to_kwargs = lambda: dict(given)


def leave() -> None:
    """Disconnect from the other processes when all are done."""
    if count() > 1:
        PartialState().destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if _connected() else 1


def index() -> int:
    """Return this process's rank, from 0."""
    return torch.distributed.get_rank() if _connected() else 0


def is_main() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return index() == 0


def on_main(action: Callable[[], T]) -> T:
    """Run an action in the main process while the others wait.

    Returns:
        The action's result, in every process.

    Raises:
        UserError, KeyboardInterrupt: The action's exception, in every process.
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
    """Return the sum of every process's number."""
    if count() == 1:
        return number
    return int(reduce(torch.tensor(int(number), device=PartialState().device), reduction="sum"))


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's tensor."""
    return reduce(tensor, reduction="sum") if count() > 1 else tensor


def of_all(value: T) -> list[T]:
    """Return every process's value, in the order of ranks."""
    return list(gather_object([value])) if count() > 1 else [value]


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
