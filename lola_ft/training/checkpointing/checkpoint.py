"""Checkpoints on disk: folders `checkpoints/step-N`, each with the checksums of its files.

A checkpoint is written under a temporary name and then renamed, so a folder `step-N` is always complete. Its files:

state.json, state.safetensors   everything that exact resuming needs (listed in `contents.py`)
trainer_state.json              transformers' own record
metrics.jsonl                   the run's metrics up to this step
adapter/                        an ordinary adapter folder, for users
SHA256SUMS                      the checksums, in the form of `sha256sum -c`
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lola_ft.errors import UserError, WriteError
from lola_ft.files import replace_folder, sha256_of
from lola_ft.training.checkpointing.state_file import read_state

_PREFIX = "step"
SUMS_FILE = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint that was read."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return step_of(self.folder)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint within the folder of all checkpoints."""
    return folder / f"{_PREFIX}-{step}"


def step_of(folder: Path) -> int:
    """Return the N of `step-N`."""
    return int(folder.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """Return the `step-N` folders, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}-*") if path.name.removeprefix(f"{_PREFIX}-").isdigit()]
    return sorted(found, key=step_of)


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None], keep: int, best: int | None = None) -> Path:
    """Write `step-N` completely or not at all, then remove old checkpoints.

    Args:
        fill: A function that writes the checkpoint's files into a folder.
        keep: Number of checkpoints to keep. Checkpoints of later steps are removed: they are damaged, or from before
            the run was resumed at an earlier step.
        best: The step of a checkpoint to keep in addition.

    Raises:
        UserError: The checkpoint could not be written. All earlier checkpoints still exist.
    """
    target = step_folder(folder, step)
    try:
        with replace_folder(target) as partial:  # `.step-N.partial`, renamed to `step-N` at the end of the block
            fill(partial)
            _write_sums(partial)
            _sync(partial)
    except (OSError, SafetensorError, WriteError) as error:
        raise UserError(_not_written(target, error)) from error
    # Only now, with the new one safe on the disk, remove older ones. With keep=2, step 600 of 200, 400, 600, 800:
    # 400 and 600 stay; 200 is too old, and 800 is from before the run was resumed at 400.
    existing = checkpoints(folder)
    upto = [path for path in existing if step_of(path) <= step]
    for old in [*upto[:-keep], *existing[len(upto) :]]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)
    return target


def newest_whole(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest undamaged checkpoint, reporting the damaged ones that were skipped; None if all are damaged."""
    for path in reversed(checkpoints(folder)):
        try:
            return read_whole(path)
        except ValueError as error:
            report(f"{path} is damaged ({error}); the one before is used.")
    return None


def read_whole(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises a ValueError that names the missing or changed file."""
    try:
        _check_sums(folder)
        return Checkpoint(folder, read_state(folder))
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete folders that a killed process left."""
    for name in (f".{_PREFIX}-*.partial", f".{_PREFIX}-*.old"):
        for path in folder.glob(name):
            shutil.rmtree(path, ignore_errors=True)


def _write_sums(folder: Path) -> None:
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _check_sums(folder: Path) -> None:
    """Raise ValueError or OSError if a file is missing, added or changed; the message names it."""
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not sums:
        raise ValueError(f"{SUMS_FILE} is empty")
    present = set(_files(folder))
    if missing := sorted(set(sums) - present):
        raise ValueError(f"{missing[0]} is missing")
    if strange := sorted(present - set(sums)):
        raise ValueError(f"{strange[0]} is not one of its files")
    if changed := [name for name, digest in sums.items() if sha256_of(folder / name) != digest]:
        raise ValueError(f"{changed[0]} has changed since it was written")


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS_FILE:
            yield path.relative_to(folder).as_posix()


def _sync(folder: Path) -> None:
    """Wait until the files are on the disk: older checkpoints are removed next, and the power may fail."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _not_written(target: Path, error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    earlier = [path.name for path in checkpoints(target.parent) if path != target]
    kept = f"Earlier ones are untouched, the newest is {earlier[-1]}" if earlier else "There is no earlier one"
    return (
        f"{target}: this checkpoint could not be written ({reason}). {kept}. Make room or give permission, then go on "
        "with --resume."
    )
