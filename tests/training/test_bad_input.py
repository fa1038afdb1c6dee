"""A user's mistakes: one message each, exit code 2, nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BAD_ROWS = {
    "empty file": ("", "holds no rows"),
    "broken line": ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "rows.jsonl:2: broken JSON"),
    "missing field": ('{"instruction": "a", "answer": "b"}\n', "rows.jsonl:1: field 'output' is missing"),
    "wrong type": ('{"instruction": "a", "output": 3}\n', "rows.jsonl:1:"),
    "empty answer": ('{"instruction": "a", "output": ""}\n', "rows.jsonl:1:"),
}
BAD_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": (
        {"train": {"learnin_rate": 1.0}},
        "train.learnin_rate: unknown key. Did you mean 'learning_rate'?",
    ),
    "wrong type": ({"train": {"max_steps": "many"}}, "train.max_steps"),
    "missing data": ({"data": {"sources": [{"path": "nowhere.jsonl", "format": "alpaca"}]}}, "nowhere.jsonl"),
    "nothing to train": ({"adapter": {"attention": None, "mlp": None, "experts": None}}, "nothing would be trained"),
    "beyond LOLA's positions": ({"data": {"max_length": 4096}}, "2048 positions"),
    "beyond this base's positions": ({"data": {"max_length": 256}}, "128 learned positions"),
    "every row too long": ({"data": {"max_length": 16}}, "none of the 80 rows is left"),
    "one row too long": ({"data": {"max_length": 80, "overlong": "error"}}, "more than data.max_length 80"),
    "no such base": ({"base": {"model": "./nowhere"}}, "no such folder"),
    "float16 on a CPU": ({"base": {"dtype": "float16"}}, "float16 needs a GPU"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe(case: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    changes, expected = BAD_RECIPES[case]
    outcome = verb("train", recipe_file(**changes))
    check_refused(outcome, expected, tmp_path)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    text, expected = BAD_ROWS[case]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text, encoding="utf-8")
    changes = {"data": {"sources": [{"path": str(rows), "format": "alpaca"}]}}
    check_refused(verb("train", recipe_file(**changes)), expected, tmp_path)


def test_base_of_another_family(recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    check_refused(verb("train", recipe_file(base={"model": str(other)})), "not a LOLA checkpoint", tmp_path)


def test_truncated_base(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = verb("train", recipe_file(base={"model": str(broken)}))
    check_refused(outcome, "model.safetensors: truncated", tmp_path)


def test_base_without_tokenizer(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    check_refused(verb("train", recipe_file(base={"model": str(bare)})), "no tokenizer", tmp_path)


def test_output_that_holds_a_run(recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("mine")
    outcome = verb("train", recipe_file())
    assert outcome.code == 2
    assert "already holds a run" in outcome.err
    assert (run / "recipe.yaml").read_text() == "mine"


def test_adapter_of_another_shape(verb: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    config = json.loads((tiny_base / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    assert config["n_inner"] == 128
    from lola_ft.model import LolaForCausalLM

    config_changed = LolaForCausalLM.from_pretrained(tiny_base).config
    config_changed.n_inner = 192
    LolaForCausalLM(config_changed).save_pretrained(other)
    outcome = verb("merge", golden / "adapter", "--base", other, "--out", tmp_path / "run")
    check_refused(outcome, "does not fit this base", tmp_path)


def test_dry_run_writes_nothing(recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    outcome = verb("train", recipe_file(), "--dry-run")
    assert outcome.code == 0
    assert "What is trained" in outcome.out
    assert not (tmp_path / "run").exists()


def test_command_line_itself(recipe_file: Callable[..., Path]) -> None:
    """The real script in a real process: message on stderr, code 2, no traceback."""
    command = [sys.executable, str(Path(__file__).parents[2] / "finetune.py"), str(recipe_file()), "train.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: override 'train.lr=1': train.lr: unknown key")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def check_refused(outcome: Any, expected: str, tmp_path: Path) -> None:
    """Exit code 2, the message, no traceback, and no trace of a run."""
    assert outcome.code == 2, outcome.err
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*partial*"))
