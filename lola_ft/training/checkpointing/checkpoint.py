"""Checkpoints on disk: `checkpoints/step-N`, written beside and renamed, each with the checksums of its files.

state.json, state.safetensors   everything that exact resuming needs (`contents.py` says what)
trainer_state.json              transformers' own record
metrics.jsonl                   the run's, as it was at this step
adapter/                        the adapter as every other adapter folder, for users
SHA256SUMS                      as `sha256sum -c` reads it
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
    """A checkpoint that was read whole."""

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
    """Write `step-N` whole or not at all, then remove what is older than the newest few.

    Args:
        fill: Writes the checkpoint's files into the folder that it is given.
        keep: How many stay. Those of later steps do not: they were damaged, or belong to what was left behind.
        best: The step of one that stays besides.

    Raises:
        UserError: It could not be written; every earlier checkpoint is still there.
    """
    target = step_folder(folder, step)
    try:
        with replace_folder(target) as partial:
            fill(partial)
            _write_sums(partial)
            _sync(partial)
    except (OSError, SafetensorError, WriteError) as error:
        raise UserError(_not_written(target, error)) from error
    existing = checkpoints(folder)
    upto = [path for path in existing if step_of(path) <= step]
    for old in [*upto[:-keep], *existing[len(upto) :]]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)
    return target


def newest_whole(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest checkpoint that is whole, reporting the damaged ones passed over; returns None if none is."""
    for path in reversed(checkpoints(folder)):
        try:
            return read_whole(path)
        except ValueError as error:
            report(f"{path} is damaged ({error}); the one before is used.")
    return None


def read_whole(folder: Path) -> Checkpoint:
    """Read a checkpoint, or raise a ValueError that says what is missing or changed."""
    try:
        _check_sums(folder)
        return Checkpoint(folder, read_state(folder))
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had begun to write."""
    for name in (f".{_PREFIX}-*.partial", f".{_PREFIX}-*.old"):
        for path in folder.glob(name):
            shutil.rmtree(path, ignore_errors=True)


def _write_sums(folder: Path) -> None:
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _check_sums(folder: Path) -> None:
    """Raises ValueError or OSError, saying which file is not as it was written."""
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
    """Wait until the disk has it: an older checkpoint is removed next, and the power may fail."""
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
