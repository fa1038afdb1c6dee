"""Trackers that get a run's metrics as well: whether they are there is asked before anything is trained."""

from collections.abc import Sequence
from importlib.util import find_spec

from lola_ft.errors import UserError

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: Naming all that are missing.
    """
    missing = [name for name in names if not any(map(find_spec, _PACKAGES.get(name, (name,))))]
    if missing:
        raise UserError(
            f"train.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install with `pip install {' '.join(missing)}`, or leave it out; metrics.jsonl is written in any case."
        )
