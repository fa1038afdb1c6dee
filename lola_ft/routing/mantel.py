"""Seeded permutation tests of agreement between two distances on the same items.

Shapes: K matrices of distances between L items, P = L*(L-1)/2 pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    """The rank correlation of two distances, and the share of permutations that reach it (one-sided).

    Attributes:
        r: From -1 to 1; NaN if a distance is the same for all pairs, or the controls explain all of it.
    """

    r: float
    p: float


@dataclass(frozen=True)
class Agreement:
    """The share of items whose nearest neighbour has the same label.

    Attributes:
        share: The share among the `asked` items, whose label at least one other item has.
        chance: The mean share with permuted labels.
        p: The share of permutations that reach `share`.
    """

    share: float
    chance: float
    p: float
    asked: int


def mantel(
    distances_KLL: Tensor, other_LL: Tensor, controls: Sequence[Tensor] = (), permutations: int = 999, seed: int = 0
) -> list[Correlation]:
    """Run Mantel's test of each of K distances against another one, on ranks (Spearman; ties share their mean rank).

    With controls it is the partial test, which correlates the residuals of linear fits on the controls' ranks. The rows
    and columns of `other_LL` are permuted together (Smouse, Long and Sokal 1986).
    """
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(len(other_LL), k=1)
    wanted_KP = np.stack([_ranks(matrix.numpy()[first, second]) for matrix in distances_KLL])
    other = np.zeros(other_LL.shape)
    other[first, second] = other[second, first] = _ranks(other_LL.numpy()[first, second])
    basis_PC = _basis([_ranks(control.numpy()[first, second]) for control in controls], len(first))

    def correlations(order: np.ndarray) -> np.ndarray:
        return left_KP @ _unit(_without(other[order[first], order[second]], basis_PC))

    left_KP = np.stack([_unit(_without(row, basis_PC)) for row in wanted_KP])
    observed = correlations(np.arange(len(other)))
    reached = np.zeros(len(observed))
    for _ in range(permutations):
        reached += correlations(generator.permutation(len(other))) >= observed - 1e-12
    p_values = np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + permutations))
    return [Correlation(float(r), float(p)) for r, p in zip(observed, p_values, strict=True)]


def neighbour_agreement(
    distances_LL: Tensor, labels: Sequence[str], permutations: int = 999, seed: int = 0
) -> Agreement:
    """Compare how often the nearest neighbour has the same label with randomly permuted labels."""
    generator = np.random.default_rng(seed)
    matrix = distances_LL.numpy().copy()
    np.fill_diagonal(matrix, np.inf)
    nearest = matrix.argmin(axis=1)
    _, ids, sizes = np.unique(np.array(labels), return_inverse=True, return_counts=True)

    def share(ids: np.ndarray) -> float:
        asked = sizes[ids] > 1
        return float((ids[nearest] == ids)[asked].mean()) if asked.any() else float("nan")

    observed = share(ids)
    dealt = np.array([share(generator.permutation(ids)) for _ in range(permutations)])
    p = (1 + int((dealt >= observed - 1e-12).sum())) / (1 + permutations)
    return Agreement(observed, float(dealt.mean()), p, int((sizes[ids] > 1).sum()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; ties share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[places].astype(float)


def _basis(controls: Sequence[np.ndarray], pairs: int) -> np.ndarray:
    """Return orthonormal columns (P, C) that span the constant and the controls, without redundant columns."""
    columns = np.stack([np.ones(pairs), *(_unit(control - control.mean()) for control in controls)], axis=1)
    left, sizes, _ = np.linalg.svd(np.nan_to_num(columns), full_matrices=False)
    return left[:, sizes > 1e-9 * sizes[0]]


def _without(values: np.ndarray, basis_PC: np.ndarray) -> np.ndarray:
    rest = values - basis_PC @ (basis_PC.T @ values)
    # If the basis explains the values, only rounding errors remain, which are not a signal.
    return rest if np.linalg.norm(rest) > 1e-9 * np.linalg.norm(values) else np.zeros_like(rest)


def _unit(values: np.ndarray) -> np.ndarray:
    """Return values scaled to length 1; NaN if all are 0."""
    length = np.linalg.norm(values)
    return values / length if length else np.full_like(values, np.nan)
