"""A run that is killed and resumed ends as if nothing had happened."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lola_ft.training import run
from lola_ft.training.checkpointing.state_file import read_state
from lola_ft.training.run_folder import LOCK_FILE, lock_folder
from tests.training.checkpointing.resume_child import run_verb
from tests.training.conftest import recipe_dict

# Of a metrics line, what depends on how fast the machine is.
_TIMES = ("tokens_per_s", "runtime", "samples_per_second", "steps_per_second")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.training.checkpointing.resume_child", "trl", "bitsandbytes", "matplotlib.pyplot"]
)


@dataclass(frozen=True)
class Child:
    """How a child process ended, and what it said."""

    code: int
    out: str


def run_child(recipe: Path, *arguments: str, moment: str = "", step: int = 0, act: str = "kill") -> Child:
    """`lola-ft train` in a process that can be killed."""
    folder = recipe.parent
    process = _CONTEXT.Process(
        target=run_verb, args=(["train", str(recipe), *arguments], str(folder), moment, step, act)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the child does not end"
    return Child(process.exitcode, (folder / "out.txt").read_text(encoding="utf-8"))


def write_recipe(folder: Path, base: Path, rows: Path, **changes: Any) -> Path:
    """Twelve steps, several epochs, with all that draws random numbers: dropout, packing, a held-out share."""
    settings = {
        "adapter": {"dropout": 0.1, "norms": True, "biases": True},
        "router": {"mode": "tuned", "aux_loss": 0.01},
        "data": {"validation": 0.2, "template": "plain", "max_length": 40},
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
    sequences, rows = map(int, re.findall(r"(\d+) sequences are packed into (\d+) rows", child.out)[0])
    assert rows < sequences / 2
    epochs = {line["step"]: line["epoch"] for line in metrics(path.parent / "run") if "epoch" in line}
    assert [step for step, epoch in epochs.items() if epoch == int(epoch)] == [0, 4, 8, 12]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step", "resume", "goes_on"),
    [
        ("state written", 6, "--resume", "Going on from step 3"),
        # Within an epoch, the oldest not yet removed.
        ("renamed", 9, "train.resume=auto", "Going on from step 9"),
        ("logged", 8, "--resume", "Going on from step 6"),
        ("logged", 2, "--resume", "no checkpoint yet"),
        ("logged", 11, "--resume", "Going on from step 9"),
        ("substep", 7, "--resume", "Going on from step 6"),
        ("evaluating", 8, "--resume", "Going on from step 6"),
        ("sums written", 12, "--resume", "Going on from step 9"),
        ("trained", 12, "--resume", "Going on from step 12"),
    ],
)
def test_killed_and_resumed_is_the_same_run(
    recipe: Path, whole: Path, moment: str, step: int, resume: str, goes_on: str
) -> None:
    killed = run_child(recipe, moment=moment, step=step)
    assert killed.code == -signal.SIGKILL, killed.out
    resumed = run_child(recipe, resume)
    assert resumed.code == 0, resumed.out
    assert goes_on in resumed.out
    assert_same_run(recipe.parent / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step", "act", "saved"),
    [
        ("evaluating", 4, "ctrl-c", "step-4"),  # the evaluation is left, and done on resuming; an epoch ends here
        ("substep", 6, "terminate", "step-7"),
    ],
)
def test_asked_to_stop_saves_and_goes_on(
    recipe: Path, whole: Path, moment: str, step: int, act: str, saved: str
) -> None:
    stopped = run_child(recipe, moment=moment, step=step, act=act)
    assert stopped.code == 130, stopped.out
    assert f"Stopped after step {saved[5:]}, saved" in stopped.out
    assert (recipe.parent / "run" / "checkpoints" / saved).is_dir()
    assert not (recipe.parent / "run" / ".lock").exists()
    lines = metrics(recipe.parent / "run")
    assert lines[-1]["step"] == int(saved[5:])
    assert not any("eval_loss" in line and line["step"] == lines[-1]["step"] for line in lines)
    resumed = run_child(recipe, "--resume")
    assert f"Going on from step {saved[5:]}" in resumed.out
    assert_same_run(recipe.parent / "run", whole)


@pytest.mark.slow
def test_an_evaluation_that_is_done_later_counts_for_early_stopping(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """No evaluation is better than the first by so much, so the third ends the run."""
    stopping = {"metric": "eval_loss", "patience": 2, "min_delta": 100.0}
    changes = {"train": {"max_steps": 16, "save_every": 0, "eval_every": 4, "early_stopping": stopping}}
    whole, cut = (write_recipe(tmp_path / name, tiny_base, rows_file, **changes) for name in ("whole", "cut"))
    assert run_child(whole).code == 0
    assert run_child(cut, moment="evaluating", step=4, act="ctrl-c").code == 130
    resumed = run_child(cut, "--resume")
    assert resumed.code == 0, resumed.out
    assert json.loads((cut.parent / "run" / "manifest.json").read_text())["results"]["steps"] == 12
    assert metrics(cut.parent / "run") == metrics(whole.parent / "run")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(recipe: Path, whole: Path) -> None:
    stopped = run_child(recipe, moment="substep", step=4, act="ctrl-c twice")
    assert stopped.code == -signal.SIGINT, stopped.out
    assert [path.name for path in (recipe.parent / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert run_child(recipe, "--resume").code == 0
    assert_same_run(recipe.parent / "run", whole)


@pytest.mark.slow
def test_no_room_for_a_checkpoint(recipe: Path, whole: Path) -> None:
    full = run_child(recipe, moment="logged", step=4, act="no room")
    assert full.code == 2, full.out
    assert "step-6: this checkpoint could not be written (File too large)" in full.out
    assert "Earlier ones are untouched, the newest is step-3" in full.out
    assert "Traceback" not in full.out
    assert [path.name for path in (recipe.parent / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert run_child(recipe, "--resume").code == 0
    assert_same_run(recipe.parent / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adamw", "log_every": 5, "scheduler": "linear", "lora_plus_ratio": 4.0},
        {"optimizer": "adamw_torch_fused", "gradient_checkpointing": True},
        {"optimizer": "adafactor", "scheduler": "constant"},
        {"optimizer": "sgd", "eval_every": 1, "early_stopping": {"patience": 9, "min_delta": 9.0}, "keep_best": True},
    ],
    ids=lambda train: train["optimizer"],
)
def test_other_settings(tmp_path: Path, tiny_base: Path, rows_file: Path, train: dict[str, Any]) -> None:
    """Not packed, losses summed over more steps than lie between checkpoints."""
    recipes = [
        write_recipe(tmp_path / name, tiny_base, rows_file, train=train, data={"packing": False})
        for name in ("whole", "killed")
    ]
    assert run_child(recipes[0]).code == 0
    killed = run_child(recipes[1], moment="sums written", step=9)
    assert killed.code == -signal.SIGKILL, killed.out
    assert "Going on from step 6" in run_child(recipes[1], "--resume").out
    assert_same_run(recipes[1].parent / "run", recipes[0].parent / "run")


@pytest.mark.slow
def test_nothing_is_trained_after_the_last_step(tmp_path: Path, tiny_base: Path, rows_file: Path) -> None:
    """The run ends within an epoch; what is left to do is to write the results."""
    recipe = write_recipe(tmp_path, tiny_base, rows_file, train={"max_steps": 10})
    assert run_child(recipe, moment="trained").code == -signal.SIGKILL
    assert "Going on from step 10" in run_child(recipe, "--resume").out
    weights, run = "adapter/adapter_model.safetensors", tmp_path / "run"
    assert (run / weights).read_bytes() == (run / "checkpoints" / "step-10" / weights).read_bytes()
    assert json.loads((run / "manifest.json").read_text())["results"]["steps"] == 10


@pytest.mark.slow
def test_the_script_killed_from_outside(tmp_path: Path, tiny_base: Path, rows_file: Path) -> None:
    """As a user would see it, with all of the machine's threads: `finetune.py`, `kill -9`, `--resume`; then SIGTERM."""
    script = [sys.executable, str(Path(__file__).parents[3] / "finetune.py")]
    whole, recipe = (write_recipe(tmp_path / name, tiny_base, rows_file) for name in ("whole", "killed"))
    subprocess.run([*script, str(whole)], capture_output=True, check=True)
    command, run = [*script, str(recipe), "train.resume=auto"], recipe.parent / "run"
    for number, lines in ((signal.SIGKILL, 4), (signal.SIGTERM, 7)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_lines(run / "metrics.jsonl", lines, process)
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number == signal.SIGTERM else -number)
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert_same_run(run, whole.parent / "run")


@pytest.mark.slow
def test_another_number_of_threads_is_said(killed_run: Path, killed: Path) -> None:
    """Every child here has one thread; the script, this time, two."""
    command = [sys.executable, "-m", "lola_ft", "train", str(killed_run), "--resume", f"output={killed}"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    resumed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "torch had 1 threads when the run was stopped and has 2 now" in resumed.stdout
    assert "OMP_NUM_THREADS=1 goes on exactly" in resumed.stdout


def wait_for_lines(file: Path, lines: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < lines:
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


# What is decided before anything is trained: on a run that was killed after step 11, with checkpoints of steps 6 and 9.


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("killed"), tiny_base, rows_file)
    assert run_child(path, moment="logged", step=11).code == -signal.SIGKILL
    return path


@pytest.fixture
def killed(killed_run: Path, tmp_path: Path) -> Path:
    """The run folder, a copy for each test."""
    return Path(shutil.copytree(killed_run.parent / "run", tmp_path / "run"))


@pytest.mark.slow
def test_how_often_to_look_may_change(killed_run: Path, killed: Path, whole: Path) -> None:
    """Evaluating draws no random numbers from training; what is logged and saved changes nothing either."""
    settings = ("train.eval_every=5", "train.log_every=2", "train.save_every=4", "train.keep=1")
    resumed = run_child(killed_run, "--resume", f"output={killed}", *settings)
    assert resumed.code == 0, resumed.out
    weights = "adapter/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert [line["step"] for line in metrics(killed) if "loss" in line] == [*range(1, 10), 10, 12]
    assert [line["step"] for line in metrics(killed) if "eval_loss" in line] == [0, 4, 8, 10, 12, 12]
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-12"]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE  # a killed process leaves the file, not the lock
    }


@pytest.mark.slow
def test_a_changed_recipe_is_refused(killed_run: Path, killed: Path, verb: Callable[..., Any]) -> None:
    before = snapshot(killed)
    changes = ("train.learning_rate=0.5", "adapter.mlp.rank=2", "train.keep=7", f"output={killed}")
    outcome = verb("train", killed_run, "--resume", *changes)
    assert outcome.code == 2
    assert "  train.learning_rate: 0.01 there, 0.5 now" in outcome.err
    assert "  adapter.mlp.rank: 8 there, 2 now" in outcome.err
    assert "keep" not in outcome.err
    one = verb("train", killed_run, "--resume", *changes, "--allow-changed", "adapter")
    assert one.code == 2
    assert "adapter.mlp" not in one.err
    assert "learning_rate" in one.err
    assert snapshot(killed) == before


@pytest.mark.slow
def test_allowed_changes_name_keys_and_need_resume(killed_run: Path, killed: Path, verb: Callable[..., Any]) -> None:
    outcome = verb("train", killed_run, f"output={killed}", "--resume", "--allow-changed", "train.leraning_rate")
    assert outcome.code == 2
    assert "a recipe has no such key" in outcome.err
    outcome = verb("train", killed_run, f"output={killed}", "--allow-changed", "train.learning_rate")
    assert outcome.code == 2
    assert "Add --resume" in outcome.err


@pytest.mark.slow
def test_an_allowed_change_is_carried_out(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    """Rates and decay are part of the optimiser's and the scheduler's states, too."""
    train = {"max_steps": 4, "save_every": 2, "learning_rate": 0.01, "lora_plus_ratio": 4.0, "optimizer": "adamw"}
    recipe, folder = recipe_file(train=train), tmp_path / "run"
    assert verb("train", recipe).code == 0
    before = {line["step"]: line["learning_rate"] for line in metrics(folder) if "learning_rate" in line}
    (folder / "README.md").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-4")
    wanted = {"learning_rate": 0.001, "lora_plus_ratio": 8.0, "weight_decay": 0.5}
    allowed = [word for key in wanted for word in ("--allow-changed", f"train.{key}")]
    resumed = verb("train", recipe, "--resume", *(f"train.{key}={value}" for key, value in wanted.items()), *allowed)
    assert "Going on from step 2" in resumed.out, resumed.err
    after = {line["step"]: line["learning_rate"] for line in metrics(folder) if "learning_rate" in line}
    assert after == {1: before[1], 2: before[2]} | {n: pytest.approx(before[n] / 10, rel=1e-9) for n in (3, 4)}
    groups = read_state(folder / "checkpoints" / "step-4")["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.001, 0.008}
    assert {group["weight_decay"] for group in groups if group["params"]} <= {0.5, 0.0}
    assert any(group["weight_decay"] == 0.5 for group in groups)


@pytest.mark.slow
def test_another_optimiser_cannot_go_on(killed_run: Path, killed: Path, verb: Callable[..., Any]) -> None:
    change = ("train.optimizer=sgd", f"output={killed}", "--allow-changed", "train")
    outcome = verb("train", killed_run, "--resume", *change)
    assert outcome.code == 2
    assert "train.optimizer was adamw_8bit when this run was started and is sgd now" in outcome.err


@pytest.mark.slow
def test_without_resume_a_run_is_not_touched(killed_run: Path, killed: Path, verb: Callable[..., Any]) -> None:
    before = snapshot(killed)
    outcome = verb("train", killed_run, f"output={killed}")
    assert outcome.code == 2
    assert "Go on with it with --resume" in outcome.err
    assert snapshot(killed) == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_second_process_is_refused(
    killed_run: Path, killed: Path, verb: Callable[..., Any], resume: tuple[str, ...]
) -> None:
    with lock_folder(killed):
        outcome = verb("train", killed_run, f"output={killed}", *resume)
        assert outcome.code == 2
        assert ("is training here" if resume else "which is going on") in outcome.err
        assert (killed / ".lock").exists()
    assert not (killed / ".lock").exists()


@pytest.mark.slow
def test_stopped_after_the_last_step_nothing_is_lost(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without checkpoints on the way; the last evaluation, or writing, may take long."""

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = recipe_file(data={"validation": 0.2}, train={"max_steps": 2, "save_every": 0})
    with monkeypatch.context() as patch:
        patch.setattr(run, "_of_evaluation", stopped)
        assert verb("train", recipe).code == 130
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    resumed = verb("train", recipe, "--resume")
    assert resumed.code == 0, resumed.err
    assert "Going on from step 2" in resumed.out
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]


def test_stopped_before_anything_is_read(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lola_ft.recipe.load_recipe", stopped)
    outcome = verb("train", recipe_file())
    assert (outcome.code, outcome.err) == (130, "\nStopped.\n")


def test_killed_before_its_recipe_was_there(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (LOCK_FILE, ".recipe.yaml.partial"):
        (tmp_path / "run" / name).write_text("1\n")
    outcome = verb("train", recipe_file(train={"max_steps": 1}), "--resume")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(whole: Path, verb: Callable[..., Any]) -> None:
    before = snapshot(whole)
    outcome = verb("train", whole.parent / "recipe.yaml", "--resume")
    assert outcome.code == 0
    assert "is finished" in outcome.out
    assert snapshot(whole) == before


@pytest.mark.slow
def test_changed_data_is_refused(killed_run: Path, killed: Path, verb: Callable[..., Any], rows_file: Path) -> None:
    before, rows = snapshot(killed), rows_file.read_bytes()
    try:
        rows_file.write_bytes(rows.replace(b"seven", b"eleven"))
        outcome = verb("train", killed_run, f"output={killed}", "--resume")
    finally:
        rows_file.write_bytes(rows)
    assert outcome.code == 2
    assert "the data has changed" in outcome.err
    assert snapshot(killed) == before


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(killed_run: Path, verb: Callable[..., Any]) -> None:
    outcome = verb("train", killed_run, "output=/proc/run", "--resume")
    assert outcome.code == 2
    assert "/proc/run: cannot be written to" in outcome.err


@pytest.mark.parametrize("arguments", [(), ("--resume",), ("--dry-run",)])
def test_a_folder_that_cannot_be_written_is_found_before_the_base(
    recipe: Path, tmp_path: Path, verb: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    for output in ("/proc/run", f"{tmp_path / 'file'}/deeper/run"):
        outcome = verb("train", recipe, f"output={output}", "base.model=./no-such-base", *arguments)
        assert outcome.code == 2
        assert f"{output}: cannot be written to" in outcome.err.replace("\n", "")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(killed_run: Path, killed: Path, whole: Path) -> None:
    tensors = killed / "checkpoints" / "step-9" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    resumed = run_child(killed_run, "--resume", f"output={killed}")
    assert resumed.code == 0, resumed.out
    assert "step-9 is damaged (state.safetensors has changed since it was written)" in resumed.out
    assert "Going on from step 6" in resumed.out
    assert_same_run(killed, whole)
