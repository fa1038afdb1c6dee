"""Attention over a row of packed documents, cut into stretches of whole documents.

A micro batch of packed rows comes as one long row. No document sees another, but attention over the whole row costs the
square of its length, and so does its mask: for eight rows of 2,048 tokens, eight times what is needed. So neighbouring
documents are joined into stretches up to some length, and each stretch attends only to itself.

Example with stretches of at most 6 tokens, and documents of 4, 2 and 5 tokens (S = 11):

    position_ids  0 1 2 3 | 0 1 | 0 1 2 3 4
    stretches     0 to 6, with a mask (1, 1, 6, 6) that keeps the first two documents apart; 6 to 11, without a mask
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOKENS = {"cpu": 128, "cuda": 2048}
"""Most tokens of a stretch of several documents, by device: a GPU wants few large operations, a CPU little work."""


class Stretch(NamedTuple):
    """The tokens from `start` to before `stop`. Each sees itself and the earlier tokens of its document.

    Attributes:
        mask: (1, 1, S, S) bool for the stretch's S tokens, True where a token (row) sees another; None if the stretch
            is a single document.
    """

    start: int
    stop: int
    mask: Tensor | None


def stretches_of(position_ids: Tensor) -> list[Stretch] | None:
    """Return the stretches of a row of packed documents.

    Args:
        position_ids: (B, S), starting from 0 at each document. The host reads it once.

    Returns:
        None if there are several rows, or one row that is a single document or no longer than a stretch may be.
    """
    batch, seq = position_ids.shape
    most = TOKENS.get(position_ids.device.type, seq)
    if batch != 1 or seq <= most:
        return None
    # A document starts where a position is not the one before plus 1. bounds: start of each document, end of the row
    is_start_S = torch.cat([position_ids.new_ones(1), position_ids[0].diff() != 1]).bool()
    bounds = [*is_start_S.nonzero()[:, 0].tolist(), seq]
    if len(bounds) == 2:
        return None
    # Documents are added to a stretch (which began with document `start`) until the next one would make it too long.
    document_S = is_start_S.cumsum(0)
    stretches, start = list[Stretch](), 0
    for place, (begin, end) in enumerate(pairwise(bounds)):
        if end - bounds[start] > most and place > start:
            stretches.append(_stretch(bounds[start], begin, document_S, place - start))
            start = place
    return [*stretches, _stretch(bounds[start], seq, document_S, len(bounds) - 1 - start)]


def _stretch(start: int, stop: int, document_S: Tensor, documents: int) -> Stretch:
    if documents == 1:
        return Stretch(start, stop, None)
    own_S = document_S[start:stop]
    return Stretch(start, stop, (own_S[:, None] == own_S).tril_()[None, None])


def exceeds_window(config: Any, tokens: int) -> bool:
    """Return True if a stretch of so many tokens is longer than the model's sliding window.

    Then only transformers' mask of the whole row knows which layers look no further than the window.
    """
    window = getattr(config, "sliding_window", None)
    return bool(window and tokens > window)


def attend_by_stretch(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    stretches: Sequence[Stretch],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Return the attention outputs of all stretches, one after another: (B, S, H, head size).

    Args:
        attend: Function of query, key, value and mask of one stretch.
        query, key, value: (B, H, S, head size).
    """
    # `split` has one backward for all stretches. A slice's backward would fill a tensor of the whole row.
    sizes = [stop - start for start, stop, _ in stretches]
    parts = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    outs = [attend(q, k, v, stretch.mask) for (q, k, v), stretch in zip(parts, stretches, strict=True)]
    return torch.cat(outs, dim=1)
