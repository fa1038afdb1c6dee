"""Windows over a text longer than the model's positions: each token scored once, with all the context that fits."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `begin` to `end` are read, those from `scored` on are scored."""

    begin: int
    end: int
    scored: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """Cover a sequence. The first token is never scored, since nothing precedes it.

    Args:
        size: Tokens that the model can read at a time.
        stride: Tokens that a window but the first scores at most; each then has at least `size - stride` before it.
    """
    assert 0 < stride < size, f"stride {stride} must be between 1 and {size - 1}"
    scored, end = 1, min(length, size)
    yield Window(0, end, scored)
    while end < length:
        scored, end = end, min(end + stride, length)
        yield Window(end - size, end, scored)
