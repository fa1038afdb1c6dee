"""The verb and the recipe's `hub:` section, as a user calls them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import lola_ft
from lola_ft.cli import main
from lola_ft.hub import publish as publish_module
from lola_ft.hub.reload_check import compare_adapter
from lola_ft.recipe import load_recipe
from tests.conftest import assert_says

REPO = "tester/model"


def call(*arguments: str) -> int:
    """Exit code of `lola-ft …` in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, rows_file: Path) -> Callable[..., Path]:
    """Write a recipe of two steps with a `hub:` section; None leaves the section out."""

    def write(**hub: Any) -> Path:
        settings = {
            "base": {"model": str(tiny_base), "dtype": "float32"},
            "adapter": {"attention": {"rank": 4}, "experts": {"rank": 4}, "alpha": 8, "dropout": 0.0},
            "data": {
                "sources": [{"path": str(rows_file), "format": "alpaca", "language_column": "language"}],
                "max_length": 128,
            },
            "train": {"max_steps": 2, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 0},
            "hub": {"repo": REPO, "base_id": "tester/base"} | hub,
            "output": str(tmp_path / "runs" / "new"),
        }
        YAML().dump(settings, tmp_path / "recipe.yaml")
        return tmp_path / "recipe.yaml"

    return write


@pytest.fixture
def check_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process: a fresh one takes seconds, and another test has it."""

    def check(source: Any, staged: Path, base: Path) -> str:
        return f"compared {compare_adapter(base, source.folder, staged).tokens} tokens"

    monkeypatch.setattr(publish_module, "check_in_fresh_process", check)


@pytest.mark.slow
def test_publish_in_a_process_of_its_own_uploads_and_says_so(hub: Any, run: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(lola_ft.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "lola_ft", "publish", str(run), "--repo", REPO, "--base-id", "tester/base"]
    result = subprocess.run([*command, "--private"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Reloaded in a fresh process and compared" in result.stdout
    assert "on 192 tokens: largest logit difference 0 " in result.stdout
    repo = hub.repos[REPO]
    assert f"Published: {hub.url}/{REPO} (private, commit {repo.head})." in result.stdout
    assert repo.private
    assert repo.files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_refusal_is_one_message_and_exit_code_2(
    hub: Any, run: Path, make_fault: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(make_fault("/commit/main$", 403))
    assert call("publish", run, "--repo", REPO, "--base-id", "tester/base", "--skip-check") == 2
    captured = capsys.readouterr()
    assert_says(captured.err, "error: tester/model: … token … (403)")
    assert "Traceback" not in captured.err
    assert "Published" not in captured.out


@pytest.mark.slow
@pytest.mark.usefixtures("check_here")
def test_a_recipes_hub_section_publishes_at_the_end(
    hub: Any, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", recipe(private=True, layout="per_expert"), "--dry-run") == 0
    assert hub.requests == []
    assert call("train", recipe(private=True, layout="per_expert")) == 0
    out = capsys.readouterr().out
    assert "compared 192 tokens" in out
    assert f"Published: {hub.url}/{REPO} (private" in out
    files = hub.repos[REPO].files
    assert b"`per_expert`" in files["README.md"]
    (tmp_path / "recipe-there.yaml").write_bytes(files["recipe.yaml"])
    there = load_recipe(tmp_path / "recipe-there.yaml")  # valid, without what is only of this machine
    assert (there.base.model, there.hub, there.output) == ("tester/base", None, "new")
    assert [source.path for source in there.data.sources] == ["rows.jsonl"]


@pytest.mark.usefixtures("check_here")
def test_a_failed_publication_keeps_the_run_and_names_the_next_command(
    hub: Any,
    recipe: Callable[..., Path],
    run: Path,
    make_fault: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lola_ft.training.train", lambda *_, **__: run)  # ended a moment ago
    hub.faults.append(make_fault("/commit/main$", 403))
    assert call("train", recipe(private=True)) == 2
    said = capsys.readouterr().err
    assert "may not write there (403)" in said
    assert f"its adapter is in {run / 'adapter'}" in said
    advice = said.split("later with: lola-ft ")[1].split()
    assert advice == f"publish {run} --repo {REPO} --private --layout peft --base-id tester/base".split()
    assert call(*advice) == 0  # as it says
    assert "adapter_model.safetensors" in hub.repos[REPO].files


def test_no_training_begins_that_could_not_be_published(
    hub: Any, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert call("train", recipe(repo="model")) == 2
    assert call("train", recipe(base_id=None)) == 2
    said = capsys.readouterr().err
    assert_says(said, "hub.repo: 'model' … owner/name")
    assert_says(said, "hub.base_id: … folder … owner/name")
    monkeypatch.delenv("HF_TOKEN")
    assert call("train", recipe()) == 2
    assert "Log in with `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "new").exists()
    assert hub.requests == []
