"""The memory of an optimiser: its state per trained tensor, and its work space during a step."""

from dataclasses import dataclass

_FLOAT = 4
_BLOCK = 256  # bitsandbytes: numbers per scale
_SMALL = 4096  # bitsandbytes: tensors of fewer numbers are kept in float32
_PAGED_FROM = 100_000  # bitsandbytes: tensors of fewer numbers are not paged
_TABLE_BYTES = 256 * _FLOAT  # bitsandbytes: the table of 8-bit values, shared by all tensors

# Numbers that each optimiser keeps per trained number.
_TORCH = {"adamw": 2, "adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
_BITSANDBYTES = {"adamw": 2, "adamw_bnb": 2, "ademamix": 3, "lion": 1, "rmsprop_bnb": 1}


@dataclass(frozen=True)
class OptimizerBytes:
    """The memory of an optimiser in bytes.

    Attributes:
        state: State that stays on the device between steps.
        paged: State that the driver may move to the machine's memory between steps (paged optimisers on a GPU).
        work: Additional work space during a step.
        exact: True if the state is counted; otherwise it is assumed to be two float32 numbers per trained number.
    """

    state: int
    paged: int = 0
    work: int = 0
    exact: bool = True


def optimizer_bytes(name: str, numels: list[int], on_cuda: bool) -> OptimizerBytes:
    """Count the memory of the optimiser called `name` in a recipe, for trained tensors of the given sizes."""
    total = sum(numels)
    if name == "sgd":
        return OptimizerBytes(0)
    if name in _TORCH:
        # On a GPU all tensors are updated at once, which stores the root of every second moment, except in `fused`.
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
    """Return the bytes of a tensor's states, and of their scales."""
    if not eight_bit or numel < _SMALL:
        return states * _FLOAT * numel, 0
    return states * numel, states * _FLOAT * -(-numel // _BLOCK)
