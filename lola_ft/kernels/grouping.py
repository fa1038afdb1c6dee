"""Plans that sort tokens by expert into one buffer in which each expert's rows are contiguous.

A token has one row per expert that it chose. The unit that is sorted is therefore the choice: C = T * K of them, the K
choices of a token one after another. With T = 5 tokens, K = 1 choice and E = 3 experts, on a CPU:

    expert_ids_C    = [2, 0, 2, 2, 0]       token 0 chose expert 2, and so on
    counts_E        = [2, 0, 3]             padded to [2, 0, 4], so that the buffer has N = 6 rows
    starts_E        = [0, 2, 2]             and ends_E = [2, 2, 6]
    row_of_choice_C = [2, 0, 3, 4, 1]       rows 0 and 1 are expert 0's, rows 2 to 5 expert 2's
    choice_of_row() = [1, 4, 0, 2, 3, 5]    row 5 is padding: 5 = C is no choice

There are two ways to plan. Both pad, for different reasons:
- On a CPU (`group_by_expert`) each group is padded to one of a few row counts. oneDNN builds a kernel per row count (1
  to 10 ms, against 0.05 to 1 ms to run it). Group sizes change every step, so without padding nearly every product
  would build one. The whole buffer is padded for the same reason.
- On a GPU (`group_on_device`) the host must not wait for the counts. The plan is made on the GPU, each group is a
  whole number of tiles, and the buffer has room for the worst case of choices.

Shape suffixes: C choices in all, E experts, N rows of the buffer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_BUCKET = 8
_BUCKETS_BEFORE_DOUBLING = 8
BUFFER_BUCKET = 64
"""A CPU's buffer with more rows than this is padded to a multiple of this."""


@dataclass(frozen=True)
class Grouping:
    """A plan of the buffer: which row each choice has, and which rows each expert has.

    Attributes:
        row_of_choice_C: The buffer row of each choice (C,), int64.
        expert_ids_C: The expert of each choice (C,), int64.
        starts_E, ends_E: First and end row of each expert's group (E,), padding included, int32.
        expert_of_tile: The expert of each tile (num_rows / tile_rows,), int32; E for unused tiles.
        num_rows: Rows of the buffer (N), a multiple of `tile_rows`.
        tile_rows: Rows per tile. A tile belongs to one expert.
    """

    row_of_choice_C: Tensor
    expert_ids_C: Tensor
    starts_E: Tensor
    ends_E: Tensor
    expert_of_tile: Tensor
    num_rows: int
    tile_rows: int

    def choice_of_row(self) -> Tensor:
        """Return the choice of each row (N,), int64; C for padding rows."""
        choices = self.row_of_choice_C.numel()
        empty_N = torch.full((self.num_rows,), choices, device=self.row_of_choice_C.device)
        return empty_N.scatter_(0, self.row_of_choice_C, torch.arange(choices, device=empty_N.device))

    def expert_of_row(self) -> Tensor:
        """Return the expert of each row (N,), int64; the last expert for unused rows."""
        last = self.ends_E.numel() - 1
        return self.expert_of_tile.long().clamp(max=last).repeat_interleave(self.tile_rows, output_size=self.num_rows)

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (expert id, first row, end row) of each expert that got a token; the host waits for the values."""
        ends = zip(self.starts_E.tolist(), self.ends_E.tolist(), strict=True)
        return [(expert_id, first, end) for expert_id, (first, end) in enumerate(ends) if end > first]


def group_by_expert(expert_ids_C: Tensor, num_experts: int) -> Grouping:
    """Plan the buffer on a CPU; reads the counts to the host once.

    Args:
        expert_ids_C: The expert of each choice (C,), int64.
    """
    # Rows per expert (E,), each rounded up to a bucket; the last entry is what pads the buffer as a whole.
    counts_E = torch.bincount(expert_ids_C, minlength=num_experts)
    padded = [padded_rows(count) for count in counts_E.tolist()]
    unused = -sum(padded) % BUFFER_BUCKET if sum(padded) > BUFFER_BUCKET else 0
    padded_E = torch.tensor([*padded, unused], device=expert_ids_C.device)
    # Groups lie one after another: ends are running sums, (E + 1,) with the unused rows at the end.
    ends_E = padded_E.cumsum(0)
    starts_E = ends_E - padded_E
    # Tiles of one row, so that this is also the expert of each tile; unused rows have expert E.
    expert_of_row = torch.arange(num_experts + 1, device=ends_E.device).repeat_interleave(padded_E).int()
    return Grouping(
        _rows_of_choices(expert_ids_C, counts_E, starts_E[:-1]),
        expert_ids_C,
        starts_E[:-1].int(),
        ends_E[:-1].int(),
        expert_of_row,
        expert_of_row.numel(),
        1,
    )


def group_on_device(expert_ids_C: Tensor, num_experts: int, tile_rows: int) -> Grouping:
    """Plan the buffer on the device of `expert_ids_C`; the host reads nothing.

    Args:
        expert_ids_C: The expert of each choice (C,), int64.
    """
    choices, device = expert_ids_C.numel(), expert_ids_C.device
    # Tiles in the worst case: a full tile needs tile_rows choices, and each chosen expert has at most one partial tile.
    num_tiles = choices // tile_rows + min(num_experts, choices)
    # Choices per expert (E,). bincount would make the host wait.
    ones_C = torch.ones_like(expert_ids_C)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, expert_ids_C, ones_C)
    # Tiles per expert, rounded up; groups lie one after another.
    tiles_E = (counts_E + tile_rows - 1) // tile_rows
    end_tiles_E = tiles_E.cumsum(0)
    starts_E = (end_tiles_E - tiles_E) * tile_rows
    # A tile's expert is the first whose group ends after it; E for tiles after the last group.
    return Grouping(
        _rows_of_choices(expert_ids_C, counts_E, starts_E),
        expert_ids_C,
        starts_E.int(),
        (end_tiles_E * tile_rows).int(),
        torch.searchsorted(end_tiles_E, torch.arange(num_tiles, device=device), right=True).int(),
        num_tiles * tile_rows,
        tile_rows,
    )


def padded_rows(count: int) -> int:
    """Return the padded row count of a group: a power of two below 8 (decoding), else a multiple of its bucket."""
    if count < _SMALLEST_BUCKET:
        return 1 << (count - 1).bit_length() if count else 0
    bucket = bucket_of(count)
    return -(-count // bucket) * bucket


def bucket_of(count: int) -> int:
    """Return the number whose multiple a group is padded to: 8; 16 above 64 rows; 32 above 128 rows; and so on."""
    bucket = _SMALLEST_BUCKET
    while count > _BUCKETS_BEFORE_DOUBLING * bucket:
        bucket *= 2
    return bucket


def fitting_tile_rows(choices: int, num_experts: int) -> int:
    """Return the rows per tile: about an expert's share of the choices, a power of two from 16 to 128.

    A matrix unit takes 16 rows at least.
    """
    share = max(1, choices // num_experts)
    return min(128, max(16, 1 << (share - 1).bit_length()))


def _rows_of_choices(expert_ids_C: Tensor, counts_E: Tensor, starts_E: Tensor) -> Tensor:
    """Return each choice's row (C,): an expert's choices keep their order, from its first row on."""
    # order_C lists the choices sorted by expert; stable, so that the plan is the same every time.
    order_C = expert_ids_C.argsort(stable=True)
    sorted_ids_C = expert_ids_C[order_C]
    # Place within the group = place in the sorted list - number of choices of the experts before.
    place_C = torch.arange(order_C.numel(), device=order_C.device) - (counts_E.cumsum(0) - counts_E)[sorted_ids_C]
    return torch.empty_like(order_C).scatter_(0, order_C, starts_E[sorted_ids_C] + place_C)
