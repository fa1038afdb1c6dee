"""Attention over a row of packed documents in stretches of whole documents.

A micro batch of packed rows comes as one long row. No document sees another, yet attention over the whole row costs the
square of its length, and so does its mask: eight rows of 2,048 tokens eight times what they need. Documents that follow
one another are therefore put together up to some length, and each stretch attends to itself alone.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = {"cpu": 512, "cuda": 2048}
"""Up to which documents are put together, by device: a GPU wants few large operations, a CPU little work."""


class Stretch(NamedTuple):
    """Tokens `start` to before `stop`, which see those of their own document before them.

    Attributes:
        mask: (1, 1, S, S) bool, True where a token (row) sees another; None if it is a single document.
    """

    start: int
    stop: int
    mask: Tensor | None


def stretches_of(position_ids: Tensor) -> list[Stretch] | None:
    """The stretches of packed documents; None where that is no single row, or not longer than one stretch may be.

    Args:
        position_ids: (B, S), starting again from 0 at each document. Read by the host once.
    """
    batch, seq = position_ids.shape
    most = TOKENS.get(position_ids.device.type, seq)
    if batch != 1 or seq <= most:
        return None
    is_start_S = torch.cat([position_ids.new_ones(1), position_ids[0].diff() != 1]).bool()
    bounds = [*is_start_S.nonzero()[:, 0].tolist(), seq]
    if len(bounds) == 2:
        return None
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
