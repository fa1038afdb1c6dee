"""Faults that a run must survive, in real processes on real files; prints what was tried and what each cost.

Lost work is the steps that were trained and had to be trained again; "-" where a fault is refused and costs none.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.training.checkpointing.resume_child import MOMENTS
from tests.training.checkpointing.test_checkpoint import Evil
from tests.training.checkpointing.test_resume import Child, assert_same_run, metrics, run_child, write_recipe

pytestmark = pytest.mark.slow
KILLS = 20
STEPS = 12


@dataclass
class Fault:
    name: str
    tried: int
    survived: int
    lost_steps: int | None


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> Iterator[list[Fault]]:
    """What was tried; printed when all is done."""
    tried: list[Fault] = []
    yield tried
    table = Table(title="Faults", title_justify="left")
    for heading in ("fault", "tried", "survived", "steps lost"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    for fault in tried:
        lost = "-" if fault.lost_steps is None else str(fault.lost_steps)
        table.add_row(fault.name, str(fault.tried), str(fault.survived), lost)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    plugins = request.config.pluginmanager
    if reporter := plugins.getplugin("terminalreporter"):  # none in a worker of several
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.write_line("\n" + text.getvalue())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    """The run that nothing interrupts."""
    path = write_recipe(tmp_path_factory.mktemp("whole"), tiny_base, rows_file)
    child = run_child(path)
    assert child.code == 0, child.out
    return path.parent / "run"


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, rows_file: Path) -> Path:
    return write_recipe(tmp_path, tiny_base, rows_file)


def last_step(run: Path) -> int:
    """Of what was logged."""
    return max((line["step"] for line in metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def going_on_from(child: Child) -> int:
    """The step that a resumed run began with."""
    found = re.search(r"Going on from step (\d+)", child.out)
    return int(found.group(1)) if found else 0


def finish(recipe: Path, whole: Path, trained: int) -> int:
    """Resume to the end, which must be the whole run's; how many of the trained steps were done again."""
    resumed = run_child(recipe, "--resume")
    assert resumed.code == 0, resumed.out
    assert_same_run(recipe.parent / "run", whole)
    return max(0, trained - going_on_from(resumed))


def test_random_kills(recipe: Path, whole: Path, faults: list[Fault]) -> None:
    """Twenty kills, one process after another, at random moments of random steps."""
    chance, run = random.Random(0), recipe.parent / "run"
    moments = [moment for moment in MOMENTS if moment != "trained"]
    kills = lost = trained = 0
    while kills < KILLS:
        moment, step = chance.choice(moments), min(STEPS, trained + chance.randint(0, 3))
        child = run_child(recipe, "train.resume=auto", moment=moment, step=step)
        lost += max(0, trained - going_on_from(child)) if trained else 0
        trained = last_step(run)
        if child.code == 0:  # the moment never came, and the run ended: begin anew
            assert_same_run(run, whole)
            shutil.rmtree(run)
            trained = 0
            continue
        assert child.code == -signal.SIGKILL, child.out
        kills += 1
    lost += finish(recipe, whole, trained)
    faults.append(Fault("kill -9 at a random moment", kills, kills, lost))


@pytest.mark.parametrize("moment", ["state written", "sums written", "renamed"])
def test_killed_within_a_checkpoint(moment: str, recipe: Path, whole: Path, faults: list[Fault]) -> None:
    assert run_child(recipe, moment=moment, step=6).code == -signal.SIGKILL
    faults.append(Fault(f"kill -9 within a save: {moment}", 1, 1, finish(recipe, whole, 6)))


def test_sigterm_during_evaluation(recipe: Path, whole: Path, faults: list[Fault]) -> None:
    stopped = run_child(recipe, moment="evaluating", step=8, act="terminate")
    assert stopped.code == 130, stopped.out
    faults.append(Fault("SIGTERM during evaluation", 1, 1, finish(recipe, whole, 8)))


def test_disk_full_in_a_save(recipe: Path, whole: Path, faults: list[Fault]) -> None:
    full = run_child(recipe, moment="logged", step=7, act="no room")
    assert full.code == 2, full.out
    assert "Traceback" not in full.out
    faults.append(Fault("disk full in a save", 1, 1, finish(recipe, whole, 9)))


def test_disk_full_in_a_merge(whole: Path, tmp_path: Path, faults: list[Fault]) -> None:
    out = tmp_path / "merged"
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from lola_ft.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "merge", str(whole), "--out", str(out), "--check", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    again = subprocess.run(
        [sys.executable, "-m", "lola_ft", "merge", str(whole), "--out", str(out)], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "merge_report.json").read_text())["changed"] > 0
    faults.append(Fault("disk full in a merge", 1, 1, None))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "adapter truncated": lambda newest: truncate(newest / "adapter" / "adapter_model.safetensors"),
    "optimiser state truncated": lambda newest: truncate(newest / "state.safetensors"),
    "state replaced by a pickle bomb": lambda newest: (newest / "state.safetensors").write_bytes(
        pickle.dumps(Evil(newest.parent.parent / "ran"))
    ),
    "half of the files gone": lambda newest: shutil.rmtree(newest / "adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage: str, recipe: Path, whole: Path, faults: list[Fault]) -> None:
    assert run_child(recipe, moment="logged", step=11).code == -signal.SIGKILL
    run = recipe.parent / "run"
    DAMAGES[damage](run / "checkpoints" / "step-9")
    resumed = run_child(recipe, "--resume")
    assert resumed.code == 0, resumed.out
    assert "step-9 is damaged" in resumed.out
    assert going_on_from(resumed) == 6
    assert not (run / "ran").exists()
    assert_same_run(run, whole)
    faults.append(Fault(f"newest checkpoint: {damage}", 1, 1, 11 - 6))


def test_two_runs_in_one_folder(recipe: Path, whole: Path, faults: list[Fault]) -> None:
    """A second process comes while the first one is in its middle."""
    script = [sys.executable, "-m", "lola_ft", "train", str(recipe)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the whole run had: two would sum in another order
    first = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    while last_step(recipe.parent / "run") < 1:
        assert first.poll() is None
    second = run_child(recipe, "--resume")
    assert second.code == 2, second.out
    assert first.wait(timeout=120) == 0
    assert_same_run(recipe.parent / "run", whole)
    faults.append(Fault("a second run in the folder", 1, 1, None))


def test_recipe_edited_between_runs(recipe: Path, whole: Path, faults: list[Fault]) -> None:
    assert run_child(recipe, moment="logged", step=7).code == -signal.SIGKILL
    text = recipe.read_text()
    recipe.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    refused = run_child(recipe, "--resume")
    assert refused.code == 2, refused.out
    assert "train.learning_rate" in refused.out
    recipe.write_text(text)
    faults.append(Fault("recipe edited between runs", 1, 1, finish(recipe, whole, 7)))


@pytest.mark.parametrize("jump", ["a year back", "a year ahead"])
def test_the_clock_jumps(jump: str, recipe: Path, whole: Path, faults: list[Fault]) -> None:
    killed = run_child(recipe, moment="logged", step=5, act=jump)  # goes on after the jump, and ends
    assert killed.code == 0, killed.out
    assert_same_run(recipe.parent / "run", whole)
    lines = all_metrics(recipe.parent / "run")
    assert all(line.get(key, 1) > 0 for line in lines for key in ("tokens_per_s", "eval_runtime"))
    faults.append(Fault(f"the clock jumps {jump}", 1, 1, 0))


def all_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
