"""Scoring sequences: the nats of each token under a model, without ever computing a whole batch's logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from lola_ft.console import Advance
from lola_ft.data.encoding import MASKED
from lola_ft.data.encoding import Sequence as Tokens
from lola_ft.families import architecture_of
from lola_ft.kernels.loss import head_of, label_nats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Piece:
    """A window of a sequence: its ids, and labels for the tokens that it scores."""

    place: int
    ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> int:
        return len(self.labels) - self.labels.count(MASKED)


def score(
    model: Any,
    sequences: Sequence[Tokens],
    batch_size: int = 8,
    stride: int | None = None,
    advance: Advance | None = None,
) -> list[Floats]:
    """Return the nats of each sequence's labelled tokens, in their order.

    Sequences of similar length are read together. They are padded on the right, which causal attention never sees, so
    batch size and padding change numbers only by rounding.

    Args:
        stride: Tokens between windows over sequences longer than the model's positions; None means half of these.
        advance: Called after each batch with its share of all pieces.
    """
    positions = architecture_of(model.config).sizes.positions
    pieces = list(_pieces(sequences, positions, stride or positions // 2))
    order = sorted(range(len(pieces)), key=lambda number: len(pieces[number].ids))
    nats: dict[int, Floats] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = _batch_nats(model, [pieces[number] for number in batch])
        nats |= dict(zip(batch, found, strict=True))
        if advance:
            advance(len(batch) / len(order))
    parts: list[list[Floats]] = [[] for _ in sequences]
    for number, piece in enumerate(pieces):
        parts[piece.place].append(nats[number])
    return [np.concatenate([np.empty(0), *own]) for own in parts]


def _pieces(sequences: Sequence[Tokens], positions: int, stride: int) -> Iterator[_Piece]:
    """Yield the windows of all sequences, except windows that score nothing."""
    for place, (ids, labels) in enumerate(sequences):
        for begin, end, scored in windows(len(ids), positions, stride):
            piece = _Piece(place, ids[begin:end], [MASKED] * (scored - begin) + labels[scored:end])
            if piece.scored:
                yield piece


@torch.no_grad()
def _batch_nats(model: Any, batch: list[_Piece]) -> list[Floats]:
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    width = max(len(piece.ids) for piece in batch)
    ids_BS = torch.tensor([piece.ids + [0] * (width - len(piece.ids)) for piece in batch])
    labels_BS = torch.tensor([piece.labels + [MASKED] * (width - len(piece.labels)) for piece in batch])
    head_VD, trained = head_of(causal.get_output_embeddings())
    device = causal.device
    x_BSD = causal.base_model(ids_BS.to(device), use_cache=False).last_hidden_state
    x_BSD = x_BSD / architecture_of(causal.config).sizes.logit_divisor
    nats_N = label_nats(x_BSD, head_VD, labels_BS.to(device), trained).double().cpu().numpy()
    return np.split(nats_N, np.cumsum([piece.scored for piece in batch])[:-1])


class Window(NamedTuple):
    """A window: tokens `begin` to `end` are read, and those from `scored` on are scored."""

    begin: int
    end: int
    scored: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """Yield windows that cover a sequence. The first token is never scored, because nothing precedes it.

    Args:
        size: Tokens that the model can read at a time.
        stride: Most tokens that a window scores, except the first; each has at least `size - stride` tokens before it.
    """
    assert 0 < stride < size, f"stride {stride} must be between 1 and {size - 1}"
    scored, end = 1, min(length, size)
    yield Window(0, end, scored)
    while end < length:
        scored, end = end, min(end + stride, length)
        yield Window(end - size, end, scored)
