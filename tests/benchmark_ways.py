"""Ways that `benchmarks/turns.py` can start in processes of their own."""

from collections.abc import Callable


def sleeping(seconds: float) -> Callable[[], float]:
    """A way whose every step says that it took so many seconds."""
    return lambda: seconds


def failing() -> Callable[[], float]:
    """A way whose model is not there."""
    raise SystemExit("no model")
