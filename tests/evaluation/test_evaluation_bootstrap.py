"""Intervals are seeded, as wide as they should be, and paired where models are compared."""

import json

import numpy as np
import pytest

from lola_ft.evaluation import compare
from lola_ft.evaluation.bootstrap import Estimate, bootstrap, ratio
from lola_ft.evaluation.comparison import ALL, shown, tables
from lola_ft.evaluation.task import Measure, Measured

RNG = np.random.default_rng(7)


def parts(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = RNG.normal(3, 2, 400)
    [estimate], [difference] = bootstrap([parts(values)], ratio, resamples=4000)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(400)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert difference == Estimate(0, 0, 0)


def test_the_value_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    [estimate], _ = bootstrap([np.array([[1.0, 1.0], [9.0, 3.0]])], ratio)
    assert estimate.value == 10 / 4
    assert (estimate.low, estimate.high) == (1, 3), "the resamples are 1/1, 10/4 and 18/6"


def test_differences_are_paired() -> None:
    first = RNG.normal(0, 50, 100)
    second = first + 0.5 + RNG.normal(0, 0.1, 100)
    (one, two), (_, difference) = bootstrap([parts(first), parts(second)], ratio)
    assert two.high - two.low > 10, "each alone is uncertain"
    assert difference.beyond_zero
    assert 0.4 < difference.low < 0.5 < difference.high < 0.6
    assert one.low < two.value < one.high


def test_equal_seeds_give_equal_intervals() -> None:
    values = [parts(RNG.normal(size=50))]
    assert bootstrap(values, ratio, seed=1) == bootstrap(values, ratio, seed=1)
    assert bootstrap(values, ratio, seed=1) != bootstrap(values, ratio, seed=2)


def test_nothing_to_measure_is_no_number() -> None:
    [estimate], _ = bootstrap([np.zeros((3, 2))], ratio)
    assert shown(estimate, percent=False) == "–"
    assert json.dumps(estimate.as_dict()) == '{"value": null, "low": null, "high": null}'


def test_one_row_has_no_interval() -> None:
    (one, two), (_, difference) = bootstrap([np.array([[3.0, 2.0]]), np.array([[5.0, 2.0]])], ratio)
    assert (one.value, two.value, difference.value) == (1.5, 2.5, 1.0)
    assert shown(two, percent=False) == "2.500"
    assert not difference.beyond_zero


def test_languages_are_measured_apart_and_together() -> None:
    values = [np.array([1.0, 2.0, 30.0]), np.array([2.0, 3.0, 10.0])]
    measured = [Measured({"bits": parts(one)}, [{}] * 3) for one in values]
    found = compare(["old", "new"], measured, {"bits": Measure("bits", ratio)}, ["sw", "sw", "de"])
    assert list(found.lines["bits"]) == [ALL, "de", "sw"]
    line = found.lines["bits"]["sw"]
    assert (line.rows, line.values[1].value, line.differences[1].value) == (2, 2.5, 1.0)
    assert found.lines["bits"][ALL].differences[1].value == pytest.approx(5 - 11)
    alone = compare(["old", "new"], [Measured({"bits": parts(v[:2])}, []) for v in values], found.measures, ["sw"] * 2)
    assert alone.lines["bits"] == {"sw": line}, "other languages do not change a language's numbers"
    [table] = tables(found)
    assert table.row_count == 3
    text = [str(cell) for column in table.columns for cell in column.cells]
    assert "+1.000 \\[+1.000 to +1.000]*" in text
