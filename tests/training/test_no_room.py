"""What a run writes beside checkpoints, on a disk that is full."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from lola_ft.errors import UserError, WriteError
from lola_ft.training.reports.metrics import MetricsFile
from lola_ft.training.reports.plots import plot_loss


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file can grow beyond a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_of_metrics() -> None:
    with pytest.raises(UserError, match=r"step 3 could not be written \(No space left on device\).* with --resume"):
        MetricsFile(Path("/dev/full")).write(3, {"loss": 1.0})


@pytest.mark.usefixtures("no_room")
def test_a_plot(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"loss.png: cannot be written \(File too large\)"):
        plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
