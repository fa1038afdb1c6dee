"""Products of grouped rows, one expert after another: used on CPUs, and the reference for the other ways.

Weights are read one tile at a time, so that a 4-bit weight is dense only while it is multiplied with. Threads work side
by side, each on one expert at a time.

Shape suffixes: N rows of the grouped buffer, E experts, I inputs and O outputs of the projection, R rank. In the loops,
e is the expert's id, and i and j are the first and end row of its group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.products import Side
from lola_ft.kernels.stacks import WeightStack
from lola_ft.kernels.threads import side_by_side
from lola_ft.kernels.tiles import Tiles, times, times_transposed

_FEWEST_ROWS = 64
"""Rows of the buffer from which threads are worth their start. Fewer rows are decoding."""


class _Turn(NamedTuple):
    """One expert's work: its id, the first and end row of its group, and its dense weight as stored."""

    expert_id: int
    first: int
    end: int
    tiles: Tiles


class LoopProducts:
    """Multiply one expert's rows at a time. The methods are those of `Products`."""

    recomputes_activations = False

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        out_NO = _empty_rows(x_NI, weight.out_features, groups)
        bias_EO = None if weight.bias is None else weight.bias.detach().to(x_NI.dtype)
        multiply = times if weight.is_transposed else times_transposed

        def run(turn: _Turn) -> None:
            # out (n, O) of the expert's n rows = bias (O,) + x (n, I) @ W (I, O) + side path
            e, i, j, tiles = turn
            if bias_EO is not None:
                out_NO[i:j] = bias_EO[e]
            multiply(x_NI[i:j], tiles, out_NO[i:j], add=bias_EO is not None)
            _add_side(out_NO, side, e, i, j)

        _for_each(run, _turns(weight, groups, x_NI.dtype), x_NI)
        return out_NO

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        out_NI = _empty_rows(x_NO, weight.in_features, groups)
        multiply = times_transposed if weight.is_transposed else times

        def run(turn: _Turn) -> None:
            # out (n, I) = x (n, O) @ W.T (O, I) + side path
            e, i, j, tiles = turn
            multiply(x_NO[i:j], tiles, out_NI[i:j])
            _add_side(out_NI, side, e, i, j)

        _for_each(run, _turns(weight, groups, x_NO.dtype), x_NO)
        return out_NI

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        out_NR = _empty_rows(x_NI, factor_ERI.shape[1], groups)

        def run(span: tuple[int, int, int]) -> None:
            # (n, I) @ (I, R) -> (n, R)
            e, i, j = span
            torch.mm(x_NI[i:j], factor_ERI[e].t(), out=out_NR[i:j])

        _for_each(run, groups.spans(), x_NI)
        return out_NR

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        out_ERI = left_NR.new_zeros(groups.ends_E.numel(), left_NR.shape[1], right_NI.shape[1])

        def run(span: tuple[int, int, int]) -> None:
            # (R, n) @ (n, I) -> (R, I)
            e, i, j = span
            torch.mm(left_NR[i:j].t(), right_NI[i:j], out=out_ERI[e])

        _for_each(run, groups.spans(), right_NI)
        return out_ERI


def _empty_rows(like: Tensor, columns: int, groups: Grouping) -> Tensor:
    """Return rows (N, columns) to fill. Rows after the last group are zeros."""
    rows = like.new_empty(like.shape[0], columns)
    rows[int(groups.ends_E[-1]) :] = 0
    return rows


def _turns(weight: WeightStack, groups: Grouping, dtype: torch.dtype) -> list[_Turn]:
    """Return the work of each expert that got a token."""
    spans = groups.spans()
    tiles = weight.tiles([e for e, _, _ in spans], dtype)
    return [_Turn(*span, own) for span, own in zip(spans, tiles, strict=True)]


def _for_each(run: Callable[..., None], items: list, x_NI: Tensor) -> None:
    if x_NI.device.type == "cpu" and x_NI.shape[0] >= _FEWEST_ROWS:
        side_by_side(run, items)
    else:
        for item in items:
            run(item)


def _add_side(out_NO: Tensor, side: Side | None, e: int, i: int, j: int) -> None:
    """Add an expert's LoRA side path, if any, to its rows: (n, R) @ (R, O) -> (n, O)."""
    if side is None:
        return
    hidden_NR, factor_RO = side.hidden_NR[i:j], side.factor_EOR[e].t()
    if side.keep_NO is None:
        out_NO[i:j].addmm_(hidden_NR, factor_RO)
    else:
        out_NO[i:j] += hidden_NR @ factor_RO * side.keep_NO[i:j] * side.scale
