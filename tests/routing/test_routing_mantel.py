"""Permutation tests: known correlations, what a control takes away, and what chance alone gives."""

import numpy as np
import pytest
import torch

from lola_ft.routing.mantel import mantel, neighbour_agreement


def distances(points: torch.Tensor) -> torch.Tensor:
    return torch.cdist(points, points).double()


def points(seed: int, count: int = 20, columns: int = 2) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).double()


def test_plain_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = distances(points(0)), (distances(points(1)) * 2).round()  # ties
    upper = np.triu_indices(20, 1)
    expected = stats.spearmanr(a.numpy()[upper], b.numpy()[upper]).statistic
    [found] = mantel(a[None], b, permutations=9)
    assert found.r == pytest.approx(expected, abs=1e-12)


def test_equal_distances_correlate_and_nothing_reaches_them() -> None:
    a = distances(points(0))
    same, monotone = mantel(torch.stack([a, a.exp()]), a, permutations=199)
    assert (same.r, same.p) == (pytest.approx(1), 1 / 200)
    assert monotone.r == pytest.approx(1)


def test_unrelated_distances_are_as_good_as_permuted_ones() -> None:
    """Under no relation p is uniform: about a tenth of forty cases lie below 0.1."""
    p_values = [mantel(distances(points(s))[None], distances(points(s + 100)), permutations=99)[0].p for s in range(40)]
    assert 0 < sum(p <= 0.1 for p in p_values) <= 10
    assert 0.35 < sum(p_values) / 40 < 0.65


def test_a_control_takes_away_what_it_explains() -> None:
    """Two distances that agree only because both follow a third."""
    third = distances(points(0, 40, 1))
    noise = [distances(points(seed, 40, 1)) * 0.3 for seed in (1, 2)]
    a, b = (third + one for one in noise)
    [raw] = mantel(a[None], b, permutations=199)
    [partial] = mantel(a[None], b, [third], permutations=199)
    assert raw.r > 0.6
    assert raw.p == 1 / 200
    assert abs(partial.r) < 0.2
    [itself] = mantel(a[None], a, [a], permutations=9)
    assert np.isnan(itself.r)
    assert np.isnan(itself.p)


def test_partial_correlation_is_that_of_residuals() -> None:
    stats = pytest.importorskip("scipy.stats")
    matrices = [distances(points(seed)) for seed in range(4)]
    upper = np.triu_indices(20, 1)
    y, x, *controls = (stats.rankdata(matrix.numpy()[upper]) for matrix in matrices)
    design = np.stack([np.ones(len(x)), *controls], axis=1)
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (y, x)]
    [found] = mantel(matrices[0][None], matrices[1], matrices[2:], permutations=9)
    assert found.r == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-10)
    constant = torch.ones(20, 20).double()  # a control that says nothing changes nothing
    [same] = mantel(matrices[0][None], matrices[1], [*matrices[2:], constant], permutations=9)
    assert same.r == pytest.approx(found.r, abs=1e-10)


def test_equal_seeds_give_equal_results() -> None:
    a, b = distances(points(0)), distances(points(1))
    assert mantel(a[None], b, permutations=50, seed=3) == mantel(a[None], b, permutations=50, seed=3)
    assert mantel(a[None], b, permutations=50, seed=3) != mantel(a[None], b, permutations=50, seed=4)


def test_neighbours_agree_in_clusters_and_at_chance_elsewhere() -> None:
    """Three tight clusters of four, one thing alone: all that can agree do; chance is (4 - 1) / (13 - 1)."""
    centres = torch.tensor([0.0, 10.0, 20.0]).repeat_interleave(4)
    where = torch.cat([centres + 0.1 * points(0, 12, 1).flatten(), torch.tensor([100.0])]).double()[:, None]
    found = neighbour_agreement(distances(where), [*"aaaabbbbcccc", "z"], permutations=999)
    assert (found.share, found.asked) == (1.0, 12)
    assert found.chance == pytest.approx(0.25, abs=0.02)
    assert found.p == 1 / 1000
    mixed = neighbour_agreement(distances(where), [*"abcabcabcabc", "z"], permutations=999)
    assert mixed.p > 0.2
