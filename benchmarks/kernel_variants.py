"""What the Triton kernels are compiled for: every combination of tile, form of the experts, direction and rank."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

TILES = (16, 32, 64, 128)
RANKS = (0, 8, 16, 32, 64, 256)  # none, one that is no multiple of 16, each block of ranks, and more than a block


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        gated: Whether gate and up are two parts of the projection.
        in_by_out: The weights' orientation.
        forward: Whether the product is the forward one, which has the bias; the other has dropout's mask.
        extra: Whether it has what only its direction can have.
        rank: LoRA's; 0 for none.
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
    """Every combination."""
    flags = [(False, True)] * 4
    combinations = itertools.product(TILES, *flags, RANKS)
    return [Variant(*values) for values in combinations if values[5] or values[3] or not values[4]]


def variants() -> list[Variant]:
    """A set in which each two values of different settings meet, chosen greedily."""
    left = all_variants()
    missing = set().union(*map(_pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda variant: len(_pairs(variant) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(variant: Variant) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(asdict(variant).items(), 2))
