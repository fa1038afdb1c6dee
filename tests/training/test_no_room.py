"""On a full disk, metrics and plots of a run fail with a message and leave nothing damaged."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from lola_ft.errors import UserError, WriteError
from lola_ft.training.reports.metrics import MetricsFile
from lola_ft.training.reports.plots import plot_loss


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Let no file grow beyond a kilobyte; also not the one that pytest's own output may go to, so only for a moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_on_a_full_disk_name_their_step() -> None:
    with pytest.raises(UserError, match=r"step 3 could not be written \(No space left on device\).* with --resume"):
        MetricsFile(Path("/dev/full")).write(3, {"loss": 1.0})


@pytest.mark.usefixtures("pictures")
def test_a_plot_on_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"loss.png: cannot be written \(File too large\)"), no_room():
        plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
