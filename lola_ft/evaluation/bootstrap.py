"""Bootstrap intervals over rows (Efron 1979), paired for differences (Koehn 2004).

A measure is a function of sums over rows (nats and bytes, right answers and questions, n-gram counts). So a resample is
a weighted sum of the rows' contributions, weighted by how often each row was drawn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Value = Callable[[Floats], Floats]
"""A function from sums (resamples, parts) to values (resamples,)."""

_CELLS = 4_000_000  # counts drawn at a time, 32 MB


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. Both are NaN without data; the interval is also NaN for a single row."""

    value: float
    low: float
    high: float

    @property
    def beyond_zero(self) -> bool:
        """Tell whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with None in place of NaN."""
        return {key: None if np.isnan(number) else number for key, number in vars(self).items()}


def bootstrap(
    parts: list[Floats], value: Value, resamples: int = 1000, seed: int = 0
) -> tuple[list[Estimate], list[Estimate]]:
    """Estimate a measure of several models that answered the same rows.

    Args:
        parts: Per model, the contributions of each row (rows, parts).

    Returns:
        Each model's value, and each model's difference to the first model, from the same resamples.
    """
    drawn = [np.full(resamples, np.nan) for _ in parts]
    done, rows = 0, len(parts[0])
    # A single row shows nothing about the differences between rows, so it has no interval.
    for counts in _draws(rows, resamples, np.random.default_rng(seed)) if rows > 1 else ():
        for own, values in zip(parts, drawn, strict=True):
            values[done : done + len(counts)] = value(counts @ own)
        done += len(counts)
    exact = [float(value(own.sum(axis=0, keepdims=True))[0]) for own in parts]
    estimates = [_estimate(one, values) for one, values in zip(exact, drawn, strict=True)]
    differences = [_estimate(one - exact[0], values - drawn[0]) for one, values in zip(exact, drawn, strict=True)]
    return estimates, differences


def _draws(rows: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield counts of how often each row is drawn, in chunks (resamples of the chunk, rows)."""
    step = max(1, _CELLS // rows)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)


def _estimate(value: float, resampled: Floats) -> Estimate:
    if np.isnan(resampled).any():
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def ratio(sums: Floats) -> Floats:
    """Return the first part divided by the second; NaN if the second is 0."""
    over, under = sums[:, 0], sums[:, 1]
    return np.divide(over, under, out=np.full(len(sums), np.nan), where=under > 0)
