"""Pictures without drawing, which takes half of a tiny run's time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lola_ft.training.reports import plots

_DRAW = {name: getattr(plots, name) for name in ("plot_loss", "plot_languages", "plot_routing")}
_SAVE = Figure.savefig
_ONE_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000b49444154789c6360000200000500017a5eab3f"
    "0000000049454e44ae426082"
)


def _save_one_pixel(_figure: Figure, to: Any, **_: Any) -> None:
    """Write a PNG of one pixel to a file or a path, in place of `Figure.savefig`."""
    to.write(_ONE_PIXEL) if hasattr(to, "write") else Path(to).write_bytes(_ONE_PIXEL)


def _draw_one_pixel(_metrics: plots.Metrics, path: Path, *_: Any) -> Path:
    """Write a PNG of one pixel in place of a run's picture."""
    path.write_bytes(_ONE_PIXEL)
    return path


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Store pictures of one pixel; which ones there are is decided as a user gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _save_one_pixel)
        for name in _DRAW:
            patch.setattr(plots, name, _draw_one_pixel)
        yield


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw pictures as a user gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _SAVE)
        for name, draw in _DRAW.items():
            patch.setattr(plots, name, draw)
        yield
