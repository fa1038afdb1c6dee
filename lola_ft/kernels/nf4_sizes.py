"""The sizes of an NF4 weight's parts, for those who store one and those who plan for one."""

from collections.abc import Iterable

BLOCK = 64
ABSMAX_BLOCK = 256
_ALIGNMENT = 256  # bytes: what a kernel reads begins at a multiple of it


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Lengths of `packed`, `absmax` and `absmax2` for a weight of `numel` values."""
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)


def starts_of_store(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return where tensors of so many bytes begin in one piece of memory, and the size of it."""
    starts, end = list[int](), 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
