"""Tokens sorted by expert into one buffer where each expert's rows are contiguous.

A token has one row for each expert that it chose: what is sorted are choices, C = T*K of them, a token's K choices one
after another.

Two plans of the same kind. On a CPU (`group_by_expert`) each group is padded to one of a few row counts: oneDNN builds
a kernel for every new count (1 to 10 ms, against 0.05 to 1 ms to run it), so unpadded groups, whose sizes change every
step, would mostly build kernels; so would the buffer as a whole, which is padded, too. On a GPU (`group_on_device`) the
host must not wait for the counts: everything is planned there, each group is whole tiles, and the buffer is as large as
the least favourable choices could make it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_BUCKET = 8
_BUCKETS_BEFORE_DOUBLING = 8
BUFFER_BUCKET = 64
"""A CPU's buffer of more rows is rounded up to a multiple of so many."""


@dataclass(frozen=True)
class Grouping:
    """Rows of a padded buffer, grouped by expert.

    Attributes:
        row_of_choice_C: The buffer row of each choice (C,), int64.
        expert_ids_C: The choices themselves, int64.
        starts_E, ends_E: First and end row of each expert's group, padding included, int32.
        expert_of_tile: Of each tile of `tile_rows` rows; the number of experts for tiles that nobody uses. int32.
        num_rows: Rows of the buffer, a multiple of `tile_rows`.
        tile_rows: Rows that surely belong to one expert.
    """

    row_of_choice_C: Tensor
    expert_ids_C: Tensor
    starts_E: Tensor
    ends_E: Tensor
    expert_of_tile: Tensor
    num_rows: int
    tile_rows: int

    def choice_of_row(self) -> Tensor:
        """Of each row, int64; the number of choices for rows between groups."""
        choices = self.row_of_choice_C.numel()
        empty_N = torch.full((self.num_rows,), choices, device=self.row_of_choice_C.device)
        return empty_N.scatter_(0, self.row_of_choice_C, torch.arange(choices, device=empty_N.device))

    def expert_of_row(self) -> Tensor:
        """Of each row, int64; the last expert for rows that nobody uses."""
        last = self.ends_E.numel() - 1
        return self.expert_of_tile.long().clamp(max=last).repeat_interleave(self.tile_rows, output_size=self.num_rows)

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert id, first row, end row) of each expert that got a token; read by the host."""
        ends = zip(self.starts_E.tolist(), self.ends_E.tolist(), strict=True)
        return [(expert_id, first, end) for expert_id, (first, end) in enumerate(ends) if end > first]


def group_by_expert(expert_ids_C: Tensor, num_experts: int) -> Grouping:
    """Plan the buffer for these choices; reads the counts to the host once."""
    counts_E = torch.bincount(expert_ids_C, minlength=num_experts)
    padded = [padded_rows(count) for count in counts_E.tolist()]
    unused = -sum(padded) % BUFFER_BUCKET if sum(padded) > BUFFER_BUCKET else 0
    padded_E = torch.tensor([*padded, unused], device=expert_ids_C.device)
    ends_E = padded_E.cumsum(0)
    starts_E = ends_E - padded_E
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
    """Plan the buffer for these choices without reading any of it."""
    choices, device = expert_ids_C.numel(), expert_ids_C.device
    # A full tile needs tile_rows choices, and each chosen expert has at most one that is not full.
    num_tiles = choices // tile_rows + min(num_experts, choices)
    ones_C = torch.ones_like(expert_ids_C)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, expert_ids_C, ones_C)
    tiles_E = (counts_E + tile_rows - 1) // tile_rows
    end_tiles_E = tiles_E.cumsum(0)
    starts_E = (end_tiles_E - tiles_E) * tile_rows
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
    """Round a group's size up: to a power of two below 8, which is decoding, else to a multiple of its bucket."""
    if count < _SMALLEST_BUCKET:
        return 1 << (count - 1).bit_length() if count else 0
    bucket = bucket_of(count)
    return -(-count // bucket) * bucket


def bucket_of(count: int) -> int:
    """What a group's size is rounded to a multiple of: 8, 16 above 64 rows, 32 above 128, and so on."""
    bucket = _SMALLEST_BUCKET
    while count > _BUCKETS_BEFORE_DOUBLING * bucket:
        bucket *= 2
    return bucket


def fitting_tile_rows(choices: int, num_experts: int) -> int:
    """Rows of a tile: about what an expert gets, between the least that a matrix unit takes and 128."""
    share = max(1, choices // num_experts)
    return min(128, max(16, 1 << (share - 1).bit_length()))


def _rows_of_choices(expert_ids_C: Tensor, counts_E: Tensor, starts_E: Tensor) -> Tensor:
    """Each choice's row: those of an expert in their order, from its first row on."""
    order_C = expert_ids_C.argsort(stable=True)
    sorted_ids_C = expert_ids_C[order_C]
    place_C = torch.arange(order_C.numel(), device=order_C.device) - (counts_E.cumsum(0) - counts_E)[sorted_ids_C]
    return torch.empty_like(order_C).scatter_(0, order_C, starts_E[sorted_ids_C] + place_C)
