"""A run that is killed and resumed ends as if nothing had happened."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.training.conftest import recipe_dict
from tests.training.resume_child import run_verb

# Of a metrics line, what depends on how fast the machine is.
_TIMES = ("tokens_per_s", "runtime", "samples_per_second", "steps_per_second")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.resume_child", "trl", "bitsandbytes", "lola_ft.training"])


@dataclass(frozen=True)
class Child:
    """How a child process ended, and what it said."""

    code: int
    out: str


def run_child(recipe: Path, *arguments: str, moment: str = "", step: int = 0, number: int = signal.SIGKILL) -> Child:
    """`lola-ft train` in a process that can be killed."""
    folder = recipe.parent
    process = _CONTEXT.Process(
        target=run_verb, args=(["train", str(recipe), *arguments], str(folder), moment, step, number)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the child does not end"
    return Child(process.exitcode, (folder / "out.txt").read_text(encoding="utf-8"))


def write_recipe(folder: Path, base: Path, rows: Path, **changes: Any) -> Path:
    """Twelve steps, more than an epoch, with all that draws random numbers: dropout, packing, a held-out share."""
    settings = {
        "adapter": {"dropout": 0.1},
        "router": {"mode": "tuned", "aux_loss": 0.01},
        "data": {"validation": 0.2},
        "train": {"max_steps": 12, "save_every": 3, "eval_every": 4},
    }
    for section, keys in changes.items():
        settings[section] = settings.get(section, {}) | keys
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    YAML().dump(recipe_dict(base, rows, folder / "run", **settings), path)
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, rows_file: Path) -> Path:
    return write_recipe(tmp_path, tiny_base, rows_file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    """The run of that recipe that nothing interrupts."""
    path = write_recipe(tmp_path_factory.mktemp("whole"), tiny_base, rows_file)
    child = run_child(path)
    assert child.code == 0, child.out
    return path.parent / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(_TIMES)} for line in lines]


def assert_same_run(run: Path, whole: Path) -> None:
    """The same adapter, byte for byte, the same metrics line for line, the same files, no lock left."""
    assert metrics(run) == metrics(whole)
    names = sorted(path.name for path in (whole / "adapter").iterdir())
    assert sorted(path.name for path in (run / "adapter").iterdir()) == names
    for name in names:
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), name
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    results = [json.loads((folder / "manifest.json").read_text())["results"] for folder in (run, whole)]
    for key in ("steps", "mean_loss", "eval_loss", "tokens"):
        assert results[0][key] == results[1][key], key
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("moment", "step", "goes_on"),
    [
        ("logged", 2, "no checkpoint yet"),
        ("state written", 6, "Going on from step 3"),
        ("renamed", 9, "Going on from step 9"),  # in the second epoch, and before the older one is removed
        ("trained", 12, "Going on from step 12"),
    ],
)
def test_killed_and_resumed_is_the_same_run(recipe: Path, whole: Path, moment: str, step: int, goes_on: str) -> None:
    killed = run_child(recipe, moment=moment, step=step)
    assert killed.code == -signal.SIGKILL, killed.out
    resumed = run_child(recipe, "--resume")
    assert resumed.code == 0, resumed.out
    assert goes_on in resumed.out
    assert_same_run(recipe.parent / "run", whole)
