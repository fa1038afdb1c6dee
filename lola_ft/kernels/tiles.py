"""Products with a weight that is given a few rows at a time, so that a 4-bit weight is never dense as a whole.

On a CPU a tile of some megabytes stays in the cache between being dequantised and being multiplied with, and its
memory is used again; a whole weight of LOLA's (64 MB in float32) would be fresh pages every time, five times slower.

Shapes: N rows of x, I and O the weight's rows and columns.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tiles = Iterator[tuple[int, Tensor]]
"""A weight (I, O) in order: first row, dense rows."""


def times(x_NI: Tensor, tiles: Tiles, out_NO: Tensor, add: bool = False) -> Tensor:
    """`x @ weight`, into `out` or added to it; a sum over the tiles."""
    for start, tile in tiles:
        part = x_NI[:, start : start + tile.shape[0]]
        if start or add:
            out_NO.addmm_(part, tile)
        else:
            torch.mm(part, tile, out=out_NO)
    return out_NO


def times_transposed(
    x_NO: Tensor, tiles: Tiles, out_NI: Tensor, bias_I: Tensor | None = None, add: bool = False
) -> Tensor:
    """`x @ weight.T + bias`, into `out` or added to it; each tile gives its own columns."""
    for start, tile in tiles:
        columns = slice(start, start + tile.shape[0])
        if add:
            out_NI[:, columns].addmm_(x_NO, tile.t())
        elif bias_I is None:
            torch.mm(x_NO, tile.t(), out=out_NI[:, columns])
        else:
            torch.addmm(bias_I[columns], x_NO, tile.t(), out=out_NI[:, columns])
    return out_NI


def one_below_another(parts: Sequence[Tiles], rows: int) -> Tiles:
    """The tiles of weights of so many rows each as those of one weight, the first on top."""
    for number, tiles in enumerate(parts):
        for start, tile in tiles:
            yield number * rows + start, tile


def side_by_side(parts: Sequence[Tiles]) -> Tiles:
    """The tiles of weights that are cut at the same rows as those of one weight, the first on the left."""
    for together in zip(*parts, strict=True):
        yield together[0][0], torch.cat([tile for _, tile in together], 1)
