"""What an optimiser keeps for each trained tensor, and what it needs while it steps."""

from dataclasses import dataclass

_FLOAT = 4
_BLOCK = 256  # bitsandbytes: numbers that share a scale
_SMALL = 4096  # bitsandbytes: tensors of fewer numbers are kept in float32
_PAGED_FROM = 100_000  # bitsandbytes: tensors of fewer numbers are not paged
_TABLE_BYTES = 256 * _FLOAT  # bitsandbytes: the values of an 8-bit state, once for all tensors

# How many numbers each optimiser keeps for one that is trained.
_TORCH = {"adamw": 2, "adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
_BITSANDBYTES = {"adamw": 2, "adamw_bnb": 2, "ademamix": 3, "lion": 1, "rmsprop_bnb": 1}


@dataclass(frozen=True)
class OptimizerBytes:
    """Of one optimiser.

    Attributes:
        state: Between steps, where it has to stay.
        paged: Between steps, what the driver may move to the machine's memory (paged optimisers on a GPU).
        work: Beside that, during a step.
        exact: Whether the state is counted; else it is taken to be two float32 numbers for each one trained.
    """

    state: int
    paged: int = 0
    work: int = 0
    exact: bool = True


def optimizer_bytes(name: str, numels: list[int], on_cuda: bool) -> OptimizerBytes:
    """State of the optimiser that a recipe calls `name`, for trained tensors of these sizes."""
    total = sum(numels)
    if name == "sgd":
        return OptimizerBytes(0)
    if name in _TORCH:
        # On a GPU all tensors are updated at once, which takes a root of every second moment; `fused` does without.
        work = _FLOAT * total if on_cuda and not name.endswith("fused") else 0
        return OptimizerBytes(_FLOAT * (_TORCH[name] * total + len(numels)), work=work)
    paged = name.startswith("paged_")
    plain = name.removeprefix("paged_")
    family = plain.removesuffix("_8bit").removesuffix("_32bit")
    known = family in _BITSANDBYTES and (plain != family or family == "rmsprop_bnb")
    if not known:
        return OptimizerBytes(2 * _FLOAT * total, work=_FLOAT * total, exact=False)
    eight_bit = plain.endswith("_8bit")
    resident = movable = 0
    for numel in numels:
        numbers, scales = _bitsandbytes_bytes(numel, _BITSANDBYTES[family], eight_bit)
        resident += scales
        if paged and on_cuda and numel >= _PAGED_FROM:
            movable += numbers
        else:
            resident += numbers
    states = _BITSANDBYTES[family]
    tables = min(states, 2) * _TABLE_BYTES if eight_bit and any(numel >= _SMALL for numel in numels) else 0
    return OptimizerBytes(resident + tables, movable, exact=family != "ademamix")


def _bitsandbytes_bytes(numel: int, states: int, eight_bit: bool) -> tuple[int, int]:
    """Bytes of the states and of their scales."""
    if not eight_bit or numel < _SMALL:
        return states * _FLOAT * numel, 0
    return states * numel, states * _FLOAT * -(-numel // _BLOCK)
