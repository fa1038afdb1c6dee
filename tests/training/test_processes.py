"""Two processes on a CPU against one: the same run, one writer, one way to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from lola_ft.errors import UserError
from lola_ft.training import processes
from tests.training.conftest import recipe_dict

ROOT = Path(__file__).parents[2]
# What `accelerate launch` starts for several GPUs; for CPUs it would want MPI.
TWO = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    str(ROOT / "finetune.py"),
]
ONE = [sys.executable, str(ROOT / "finetune.py")]


def write_recipe(folder: Path, base: Path, rows: Path, **train: Any) -> Path:
    """Rows of unequal lengths, held-out ones, two epochs of 64 rows: global batches of 8 come out even."""
    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 0.003, "optimizer": "adamw", "eval_every": 6}
    recipe = recipe_dict(
        base,
        rows,
        folder / "run",
        data={"packing": False, "max_length": 96, "validation": [{"path": str(rows), "format": "alpaca", "limit": 17}]},
        train=settings | train,
    )
    recipe["data"] |= {"leakage": "allow"}
    recipe["data"]["sources"][0]["limit"] = 64
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    YAML().dump(recipe, path)
    return path


def launch(command: list[str], *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> tuple[Path, str]:
    """A run of two processes, micro batches of 2, 2 a step."""
    recipe = write_recipe(tmp_path_factory.mktemp("two") / "two", tiny_base, rows_file, save_every=5)
    done = launch(TWO, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "run", done.stdout


@pytest.mark.slow
def test_only_one_prints_and_the_number_is_recorded(two: tuple[Path, str]) -> None:
    run, out = two
    assert out.count("2 processes: a step has 2 x 2 x 2 = 8 rows.") == 1
    assert out.count("Merge it:  lola-ft merge") == 1
    assert json.loads((run / "manifest.json").read_text())["hardware"]["processes"] == 2
    assert not (run / ".lock").exists()
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("split", [{"micro_batch_size": 4}, {"grad_accum_steps": 4}], ids=["micro", "accumulation"])
def test_the_same_run_as_one_process_with_the_same_steps(
    two: tuple[Path, str], tmp_path: Path, tiny_base: Path, rows_file: Path, split: dict[str, int]
) -> None:
    recipe = write_recipe(tmp_path / "one", tiny_base, rows_file, **split)
    done = launch(ONE, recipe)
    assert done.returncode == 0, done.stderr
    one = recipe.parent / "run"
    keys = ("loss", "mean_loss", "eval_loss")
    lines = [[line for line in metrics(run) if not line.keys().isdisjoint(keys)] for run in (two[0], one)]
    pairs = list(zip(*lines, strict=True))
    for ours, theirs in pairs:
        for key in ("step", "epoch", "learning_rate", "tokens"):
            assert ours.get(key) == theirs.get(key), key
        for key in {*keys, "grad_norm"} & (ours.keys() | theirs.keys()):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (key, ours, theirs)
        for code, loss in ours.get("eval_loss_by_language", {}).items():
            assert loss == pytest.approx(theirs["eval_loss_by_language"][code], rel=2e-4), (code, ours, theirs)
    ours, theirs = next(pair for pair in pairs if "loss" in pair[0])
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)  # six digits are written
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (two[0], one)]
    assert weights[0].keys() == weights[1].keys()
    moved = 0.0
    for name, value in weights[0].items():
        # AdamW divides by the gradient's size: a rounding error of a gradient near zero is part of a step.
        torch.testing.assert_close(
            value, weights[1][name], rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
        moved = max(moved, float(value.abs().max())) if "lora_B" in name else moved
    assert moved > 0.01


@pytest.mark.slow
def test_resumed_with_two_it_is_the_same_run_and_one_is_refused(
    two: tuple[Path, str], tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    recipe = write_recipe(tmp_path / "stopped", tiny_base, rows_file, save_every=5)
    run = recipe.parent / "run"
    process = subprocess.Popen(
        [*TWO, str(recipe)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)
    os.kill(rank_one_of(process.pid), signal.SIGTERM)  # one process alone is asked
    out, _ = process.communicate(timeout=120)
    assert out.count("saved. Go on with --resume.") == 1, out
    assert process.returncode != 0
    alone = launch(ONE, recipe, "--resume")
    assert alone.returncode == 2, alone.stdout + alone.stderr
    assert "the number of processes was 2 when this run was started and is 1 now" in alone.stderr
    resumed = launch(TWO, recipe, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed.stdout.count("Going on from step") == 1
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (two[0] / "adapter" / name).read_bytes()
    assert without_times(run) == without_times(two[0])


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(run)]


TIMES = ("tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMES += ("eval_samples_per_second", "eval_steps_per_second")


def rank_one_of(launcher: int) -> int:
    """The id of the launcher's process with number 1."""
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and f"PPid:\t{launcher}\n" in _read(entry / "status")
            and "RANK=1\0" in _read(entry / "environ")
        ):
            return int(entry.name)
    raise AssertionError("the launcher has no process with number 1")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_a_users_mistake_is_said_once(tmp_path: Path, tiny_base: Path, rows_file: Path) -> None:
    recipe = write_recipe(tmp_path / "taken", tiny_base, rows_file)
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "notes.txt").write_text("mine")
    done = launch(TWO, recipe)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "run: is not empty" in done.stderr


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_other_engines_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match="choose plain data parallelism"):
        processes.join()
