"""Choice of the fastest way to multiply, measured once per shape with the device and the tokens' choices at hand."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.products import GroupedMatmuls, Products
from lola_ft.kernels.stacks import WeightStack

_RUNS = 5
_chosen: dict[tuple[Any, ...], Products] = {}


def choose_products(x_TD: Tensor, up: WeightStack, down: WeightStack, groups: Grouping) -> Products:
    """Return the fastest way for this shape. With dense weights, or without Triton, there is only `GroupedMatmuls`.

    Args:
        x_TD: Hidden states (T, D) in the dtype to compute in.
    """
    if up.nf4 is None or down.nf4 is None or x_TD.device.type != "cuda":
        return GroupedMatmuls()
    fused = _fused()
    if fused is None or not fused.takes(up.nf4) or not fused.takes(down.nf4):
        return GroupedMatmuls()
    shape = (up.in_features, up.out_features, up.is_transposed)
    key = (x_TD.device, x_TD.dtype, shape, groups.ends_E.numel(), groups.tile_rows, groups.num_rows.bit_length())
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return GroupedMatmuls()
        _chosen[key] = _measured(x_TD, up, down, groups, fused)
    return _chosen[key]


def chosen() -> dict[str, str]:
    """Return the choices made so far: a description of each shape, and the name of its way."""
    return {
        f"{key[2][0]}x{key[2][1]}, {key[3]} experts, {key[1]}, tiles of {key[4]}, below {1 << key[5]} rows": type(
            way
        ).__name__
        for key, way in _chosen.items()
    }


@cache
def _fused() -> Any:
    """Return the Triton products, or None if Triton is not installed."""
    try:
        from lola_ft.kernels.triton_products import TritonProducts
    except ImportError:
        return None
    return TritonProducts()


def _measured(x_TD: Tensor, up: WeightStack, down: WeightStack, groups: Grouping, fused: Products) -> Products:
    seconds = {}
    for way in (GroupedMatmuls(), fused):
        try:
            seconds[way] = _time(way, x_TD, up, down, groups)
        except Exception as error:  # a compiler raises anything; the other way may work
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            warnings.warn(f"{type(way).__name__} does not run on this device ({reason}); it is not used.", stacklevel=2)
    assert seconds, "no way to multiply runs on this device; the warnings say why"
    return min(seconds, key=lambda way: seconds[way])


def _time(way: Products, x_TD: Tensor, up: WeightStack, down: WeightStack, groups: Grouping) -> float:
    """Return the milliseconds of one forward and one backward product, the fastest of `_RUNS`."""
    rows_ND = x_TD.detach().new_ones(groups.num_rows, up.in_features)
    times = []
    for run in range(_RUNS + 2):  # the first two compile and warm up
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        out_NO = way.times(rows_ND, up, groups, None)
        way.times_transposed(rows_ND, down, groups, None)
        del out_NO
        ended.record()
        ended.synchronize()
        if run >= 2:
            times.append(began.elapsed_time(ended))
    return min(times)
