"""Variants that the Triton kernels are compiled for: combinations of tile, form of the experts, direction and rank."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

TILES = (16, 32, 64, 128)
RANKS = (
    0,
    8,
    16,
    32,
    64,
    256,
)  # no LoRA, a rank that is no multiple of 16, each size of a block of ranks, and several blocks


@dataclass(frozen=True)
class Variant:
    """Settings that a kernel is compiled for.

    Attributes:
        tile: Rows of a tile.
        gated: Gate and up are two parts of the projection.
        in_by_out: Weights are stored as (in, out), else as (out, in).
        forward: The product is the forward one, else the backward one.
        extra: Forward with a bias, or backward with dropout's mask.
        rank: LoRA's rank; 0 without LoRA.
    """

    tile: int
    gated: bool
    in_by_out: bool
    forward: bool
    extra: bool
    rank: int

    def __str__(self) -> str:
        extra = {(True, True): ", bias", (False, True): ", dropout"}.get((self.forward, self.extra), "")
        return (
            f"{self.tile} rows, {'gated' if self.gated else 'plain'}, {'in x out' if self.in_by_out else 'out x in'}, "
            f"{'forward' if self.forward else 'backward'}{extra}, rank {self.rank}"
        )


def all_variants() -> list[Variant]:
    """Return every combination that occurs. Dropout's mask (backward with `extra`) occurs only with LoRA."""
    flags = [(False, True)] * 4
    combinations = itertools.product(TILES, *flags, RANKS)
    return [Variant(*values) for values in combinations if values[5] or values[3] or not values[4]]


def variants() -> list[Variant]:
    """Return a greedily chosen set of variants in which all pairs of values of two settings occur."""
    left = all_variants()
    missing = set().union(*map(_pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda variant: len(_pairs(variant) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(variant: Variant) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Return all pairs of a variant's settings, each with its value."""
    return set(itertools.combinations(asdict(variant).items(), 2))
