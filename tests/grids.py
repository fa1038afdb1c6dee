"""Grids of cases that hold one property: a few cases show it in the fast tests, the others in the slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark the cases of a grid as slow, but for some.

    Args:
        fast: The cases that stay fast; each of them must be in the grid.
        cases: Values of one parameter, or tuples of several.
    """
    cases = list(cases)
    assert all(case in cases for case in fast), "a case that is to stay fast is not in the grid"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in fast else [pytest.mark.slow])
        for case in cases
    ]
