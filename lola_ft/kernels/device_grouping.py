"""Tokens sorted by expert where the host must not wait for the counts: everything is planned on the device.

Each expert's rows start at a multiple of the tile's rows, so that a tile of a kernel belongs to one expert. The buffer
is as large as the least favourable choices could make it, which the host knows without asking.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceGrouping:
    """Rows of a padded buffer, grouped by expert; nothing of it was read by the host.

    Attributes:
        row_of_token_T: The buffer row of each token (T,), int64.
        expert_ids_T: The choices themselves, int64.
        starts_E, ends_E: First and end row of each expert's group, padding included, int32.
        expert_of_tile: Of each tile of `tile_rows` rows; the number of experts for tiles that nobody uses. int32.
        num_rows: Rows of the buffer, a multiple of `tile_rows`.
    """

    row_of_token_T: Tensor
    expert_ids_T: Tensor
    starts_E: Tensor
    ends_E: Tensor
    expert_of_tile: Tensor
    num_rows: int
    tile_rows: int

    def expert_of_row(self) -> Tensor:
        """Of each row, int64; the last expert for rows that nobody uses."""
        last = self.ends_E.numel() - 1
        return self.expert_of_tile.long().clamp(max=last).repeat_interleave(self.tile_rows, output_size=self.num_rows)


def group_on_device(expert_ids_T: Tensor, num_experts: int, tile_rows: int) -> DeviceGrouping:
    """Plan the buffer for these choices."""
    tokens, device = expert_ids_T.numel(), expert_ids_T.device
    # A full tile needs tile_rows tokens, and each expert with a token has at most one that is not full.
    num_tiles = tokens // tile_rows + min(num_experts, tokens)
    ones_T = torch.ones_like(expert_ids_T)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, expert_ids_T, ones_T)
    tiles_E = (counts_E + tile_rows - 1) // tile_rows
    end_tiles_E = tiles_E.cumsum(0)
    starts_E = (end_tiles_E - tiles_E) * tile_rows
    order_T = expert_ids_T.argsort(stable=True)
    sorted_ids_T = expert_ids_T[order_T]
    place_T = torch.arange(tokens, device=device) - (counts_E.cumsum(0) - counts_E)[sorted_ids_T]
    row_of_token_T = torch.empty_like(order_T).scatter_(0, order_T, starts_E[sorted_ids_T] + place_T)
    tiles = torch.arange(num_tiles, device=device)
    return DeviceGrouping(
        row_of_token_T,
        expert_ids_T,
        starts_E.int(),
        (end_tiles_E * tile_rows).int(),
        torch.searchsorted(end_tiles_E, tiles, right=True).int(),
        num_tiles * tile_rows,
        tile_rows,
    )


def fitting_tile_rows(tokens: int, num_experts: int) -> int:
    """Rows of a tile: about what an expert gets, between the least that a matrix unit takes and 128."""
    share = max(1, tokens // num_experts)
    return min(128, max(16, 1 << (share - 1).bit_length()))
