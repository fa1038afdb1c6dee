"""A finished run made longer: it trains on as if it had been that long; what the schedule does; what is refused."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import get_cosine_schedule_with_warmup

from lola_ft.recipe import load_recipe
from lola_ft.training import train
from tests.conftest import Outcome, assert_says
from tests.training.checkpointing.test_resume import metrics, run_child, write_recipe

TO_SIX = ("train.max_steps=6", "--resume", "--allow-changed", "train.max_steps")


# Three steps with a cosine, dropout, a trained router; checkpoints only at the end.
SHORT = {"max_steps": 3, "save_every": 0, "eval_every": 0, "learning_rate": 0.01}


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, rows_file: Path) -> Path:
    return write_recipe(tmp_path, tiny_base, rows_file, train=SHORT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("trained"), tiny_base, rows_file, train=SHORT)
    return train(load_recipe(path))


@pytest.fixture
def finished(recipe: Path, trained: Path) -> Path:
    """A finished run of that recipe, in its place."""
    return Path(shutil.copytree(trained, recipe.parent / "run"))


def losses(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in losses(run)]


def cosine(steps: int, warmup: int = 0) -> list[float]:
    """The learning rates of a cosine's steps, by transformers."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "long", "changes"),
    [
        ("max_steps=3", "max_steps=6", {}),
        ("epochs=1", "epochs=2", {}),  # ends where an epoch does
        ("epochs=1", "max_steps=7", {}),
        ("max_steps=3", "max_steps=6", {"log_every": 2}),
    ],
)
def test_a_constant_rate_gives_the_run_that_was_long_from_the_start(
    short: str,
    long: str,
    changes: dict[str, Any],
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    verb: Callable[..., Outcome],
) -> None:
    """Optimiser, order of the rows and random numbers go on: the same bits."""
    constant = {"scheduler": "constant", "save_every": 0, "eval_every": 0} | changes
    one, other = (write_recipe(tmp_path / name, tiny_base, rows_file, train=constant) for name in ("one", "other"))
    assert verb("train", one, f"train.{long}").code == 0
    assert verb("train", other, f"train.{short}").code == 0
    key = f"train.{long.partition('=')[0]}"
    longer = verb("train", other, f"train.{long}", "--resume", "--allow-changed", key)
    assert longer.code == 0, longer.err
    runs = [recipe.parent / "run" for recipe in (one, other)]
    assert losses(runs[0]) == losses(runs[1])
    assert adapter_of(runs[0]) == adapter_of(runs[1])
    manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
    for name in ("steps", "mean_loss", "eval_loss", "tokens"):
        assert manifests[0]["results"][name] == manifests[1]["results"][name], name
    assert [change["schedule"] for change in manifests[1]["extensions"]] == ["stretch"]
    assert "extensions" not in manifests[0]


@pytest.mark.slow
def test_a_cosine_is_stretched_over_the_new_length(recipe: Path, finished: Path, verb: Callable[..., Outcome]) -> None:
    before = adapter_of(finished)
    outcome = verb("train", recipe, *TO_SIX)
    assert outcome.code == 0, outcome.err
    stretched = cosine(6)
    assert rates(finished) == pytest.approx([*cosine(3), *stretched[3:]])
    assert_says(
        " ".join(outcome.out.split()),
        f"6 steps now in place of 3. … (cosine) is stretched … {stretched[3]:.3g} at step 4",
    )
    assert adapter_of(finished) != before
    assert json.loads((finished / "manifest.json").read_text())["results"]["steps"] == 6
    assert "nothing is left to do" in verb("train", recipe, "train.max_steps=6", "--resume").out


RESTART = ("train.extended_schedule=restart", "train.warmup_ratio=0.2", "train.max_steps=8")
MAY_CHANGE = ("--allow-changed", "train.max_steps", "--allow-changed", "train.warmup_ratio")


@pytest.mark.slow
def test_a_cosine_is_restarted_over_the_added_steps_alone(
    recipe: Path, finished: Path, verb: Callable[..., Outcome]
) -> None:
    outcome = verb("train", recipe, *RESTART, "--resume", *MAY_CHANGE)
    assert outcome.code == 0, outcome.err
    assert rates(finished) == pytest.approx([*cosine(3), *cosine(5, warmup=1)])
    assert "is restarted for 5 steps" in " ".join(outcome.out.split())


@pytest.mark.slow
def test_a_killed_longer_run_resumes_to_the_same_bits(
    recipe: Path, finished: Path, verb: Callable[..., Outcome]
) -> None:
    """It remembers where its schedule was restarted, and that it is not finished."""
    whole = finished.parent / "whole"
    shutil.copytree(finished, whole)
    assert verb("train", recipe, f"output={whole}", *RESTART, "--resume", *MAY_CHANGE).code == 0
    killed = run_child(recipe, *RESTART, "train.save_every=1", "--resume", *MAY_CHANGE, moment="logged", step=6)
    assert killed.code == -signal.SIGKILL, killed.out
    changed = verb("train", recipe, "train.warmup_ratio=0.2", "train.max_steps=8", "--resume")
    assert_says(changed.err, "train.extended_schedule: restart there, stretch now")
    resumed = run_child(recipe, *RESTART, "--resume")
    assert resumed.code == 0, resumed.out
    assert losses(finished) == losses(whole)
    assert adapter_of(finished) == adapter_of(whole)


@pytest.mark.parametrize("override", ["train.max_steps=2", "train.epochs=0.1"])
def test_a_run_is_not_made_shorter(override: str, recipe: Path, finished: Path, verb: Callable[..., Outcome]) -> None:
    key = override.partition("=")[0]
    before = sorted((path, path.read_bytes()) for path in finished.rglob("*") if path.is_file())
    outcome = verb("train", recipe, override, "--resume", "--allow-changed", key)
    assert outcome.code == 2
    assert_says(outcome.err, f"{key}: … has trained … A run can be made longer, not shorter: give more than")
    assert before == sorted((path, path.read_bytes()) for path in finished.rglob("*") if path.is_file())


@pytest.mark.slow
def test_an_unfinished_run_is_not_made_shorter_than_it_is(recipe: Path) -> None:
    assert run_child(recipe, "train.save_every=2", moment="logged", step=3).code == -signal.SIGKILL
    refused = run_child(recipe, "train.max_steps=1", "--resume", "--allow-changed", "train.max_steps")
    assert refused.code == 2
    assert_says(refused.out, "train.max_steps: 1, but … has trained 2 already.")
    assert run_child(recipe, "--resume").code == 0  # its recipe is as it was


def test_a_longer_run_must_be_allowed(recipe: Path, finished: Path, verb: Callable[..., Outcome]) -> None:  # noqa: ARG001
    outcome = verb("train", recipe, "train.max_steps=6", "--resume")
    assert outcome.code == 2
    assert_says(outcome.err, "train.max_steps: 3 there, 6 now … allow each with --allow-changed KEY")


def test_without_its_last_state_a_run_cannot_be_made_longer(
    recipe: Path, finished: Path, verb: Callable[..., Outcome]
) -> None:
    shutil.rmtree(finished / "checkpoints")
    outcome = verb("train", recipe, *TO_SIX)
    assert outcome.code == 2
    assert_says(outcome.err, f"its checkpoints are gone … adapter.continue_from={finished}")


@pytest.mark.slow
def test_the_best_adapter_is_that_of_the_whole_run(recipe: Path, verb: Callable[..., Outcome]) -> None:
    """Training goes on from the last state, not from the best one."""
    wild = ("train.learning_rate=0.5", "train.scheduler=constant", "data.template=alpaca", "data.max_length=128")
    best = ("train.keep_best=true", "train.eval_every=1", *wild)
    assert verb("train", recipe, *best).code == 0
    run = recipe.parent / "run"
    first = losses(run)
    assert json.loads((run / "manifest.json").read_text())["results"]["best_step"] < 3
    assert verb("train", recipe, *best, *TO_SIX).code == 0
    whole = recipe.parent / "whole"
    assert verb("train", recipe, *best, "train.max_steps=6", f"output={whole}").code == 0
    assert losses(run) == losses(whole)
    assert losses(run)[:3] == first
    assert adapter_of(run) == adapter_of(whole)


@pytest.mark.slow
def test_early_stopping_would_end_it_again(recipe: Path, verb: Callable[..., Outcome]) -> None:
    rate = ("train.learning_rate=1e-20", "train.eval_every=1", "train.early_stopping={patience: 1}")
    assert verb("train", recipe, *rate).code == 0
    run = recipe.parent / "run"
    assert json.loads((run / "manifest.json").read_text())["results"]["steps"] == 2
    outcome = verb("train", recipe, *rate, *TO_SIX)
    assert outcome.code == 2
    assert_says(outcome.err, "early stopping ended this run … --allow-changed train.early_stopping")
    assert (run / "README.md").exists()
    patient = ("train.early_stopping={patience: 9}", "--allow-changed", "train.early_stopping")
    outcome = verb("train", recipe, *rate[:2], *patient, *TO_SIX)
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "manifest.json").read_text())["results"]["steps"] == 6
