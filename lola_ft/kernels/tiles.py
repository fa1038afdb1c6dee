"""Products with a weight that comes a few rows at a time, so that a 4-bit weight is never dense as a whole.

On a CPU a tile of a few megabytes stays in the cache between dequantising and multiplying, and its memory is reused. A
whole weight of LOLA (64 MB in float32) would need new memory pages every time, which is five times slower. A weight
(4, O) in two tiles of two rows:

    x @ W    = x[:, 0:2] @ W[0:2] + x[:, 2:4] @ W[2:4]          (N, O), a sum over tiles
    x @ W.T  = [x @ W[0:2].T, x @ W[2:4].T]                     (N, 4), each tile gives its own columns

Shape suffixes: N rows of x, I rows and O columns of the weight.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tiles = Iterator[tuple[int, Tensor]]
"""A weight (I, O) as pairs of a first row and the dense rows from there on, in order."""


def times(x_NI: Tensor, tiles: Tiles, out_NO: Tensor, add: bool = False) -> Tensor:
    """Write `x @ weight` (N, O) into `out`, or add it to `out` if `add`; return `out`."""
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
    """Write `x @ weight.T + bias` (N, I) into `out`, or add `x @ weight.T` to `out` if `add`; return `out`."""
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
    """Yield the tiles of several weights, each of `rows` rows, as the tiles of one weight with the first on top."""
    for number, tiles in enumerate(parts):
        for start, tile in tiles:
            yield number * rows + start, tile


def side_by_side(parts: Sequence[Tiles]) -> Tiles:
    """Yield the tiles of several weights, cut at the same rows, as tiles of one weight with the first on the left."""
    for together in zip(*parts, strict=True):
        yield together[0][0], torch.cat([tile for _, tile in together], 1)
