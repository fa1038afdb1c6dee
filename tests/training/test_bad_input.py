"""A user's mistakes: one message each, exit code 2, nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_says

BAD_ROWS = {
    "empty file": ("", "holds no rows"),
    "broken line": ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "rows.jsonl:2: broken JSON"),
    "missing field": ('{"instruction": "a", "answer": "b"}\n', "rows.jsonl:1: field 'output' is missing"),
    "wrong type": ('{"instruction": "a", "output": 3}\n', "rows.jsonl:1:"),
    "empty answer": ('{"instruction": "a", "output": ""}\n', "rows.jsonl:1:"),
}
ONE = b'{"instruction": "a", "output": "b"}\n'
BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    # What is wrong: the file's name, its bytes, its format, the message.
    "latin-1": ("r.jsonl", ONE + b'{"instruction": "caf\xe9", "output": "b"}\n', "alpaca", "r.jsonl:2: not UTF-8 text"),
    "half of utf-16": (
        "r.jsonl",
        ONE.decode().encode("utf-16")[:-1],
        "alpaca",
        "r.jsonl: begins like UTF-16 but is not",
    ),
    "NaN": ("r.jsonl", b'{"instruction": "a", "output": NaN}\n', "alpaca", "r.jsonl:1: broken JSON: NaN is not JSON"),
    "a list in a line": ("r.jsonl", b"[1, 2]\n", "alpaca", "r.jsonl:[0]: expected an object"),
    "a list over lines": (
        "r.jsonl",
        b'[\n{"instruction": "a"}\n]\n',
        "alpaca",
        "r.jsonl:[0]: field 'output' is missing",
    ),
    "deep nesting": ("r.jsonl", b"[" * 100_000 + b"\n", "alpaca", "r.jsonl:1: nested too deeply"),
    "commas between objects": ("r.json", ONE.strip() + b",\n" + ONE, "alpaca", "Put them all in [ and ]"),
    "several lists": ("r.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "alpaca", "Choose one: `rows_under: a`"),
    "null answer": (
        "r.jsonl",
        ONE + b'{"instruction": "a", "output": null}\n',
        "alpaca",
        "r.jsonl:2: field 'output' must",
    ),
    "blank answer": ("r.jsonl", b'{"instruction": "a", "output": " \\n"}\n', "alpaca", "field 'output' is empty"),
    "half a surrogate": ("r.jsonl", b'{"instruction": "a", "output": "\\ud800"}\n', "alpaca", "half a surrogate pair"),
    "blank lines alone": ("r.jsonl", b"\n\n \n", "alpaca", "holds no rows"),
    "empty object in .json": ("r.json", b"{}", "alpaca", "r.json:1: field 'instruction' is missing"),
    "number in .json": ("r.json", b"[3]", "alpaca", "r.json:[0]: expected an object"),
    "cut .json": ("r.json", b'[{"instruction": "a"', "alpaca", "r.json:1: broken JSON at column"),
    "header alone": ("r.csv", b"instruction,output\n", "alpaca", "holds no rows"),
    "two equal columns": ("r.csv", b"output,output\na,b\n", "alpaca", "two columns are named 'output'"),
    "nameless columns": ("r.csv", b",,\na,b,c\n", "alpaca", "no column has a name"),
    "too many cells": (
        "r.csv",
        b"instruction,output\na,b,c\n",
        "alpaca",
        "r.csv:2: 3 cells between commas; the header has 2",
    ),
    "open quote": ("r.csv", b'instruction,output\na,"b\n', "alpaca", "broken table"),
    "two delimiters": ("r.tsv", b"instruction;output|x\na;b|c\n", "alpaca", "semicolons or bars"),
    "no parquet": ("r.parquet", b"PAR1 not really", "alpaca", "cannot be read as a Parquet file"),
    "empty parquet": ("r.parquet", b"", "alpaca", "holds no rows"),
    "unknown kind": ("r.xlsx", b"PK", "alpaca", "unknown kind of file '.xlsx'"),
    "pickle": ("r.pkl", b"\x80\x04N.", "alpaca", "unknown kind of file '.pkl'"),
    "blank text": ("r.txt", b"\n \n", "text", "holds no rows"),
    "binary text": ("r.txt", b"\x89PNG\r\n", "text", "r.txt:1: not UTF-8 text"),
    "text as alpaca": ("r.txt", b"one two\n", "alpaca", "r.txt:1: field 'instruction' is missing (found: text)"),
    "messages as text": ("r.jsonl", b'{"messages": "hi"}\n', "messages", "must be a list of messages"),
    "no messages": ("r.jsonl", b'{"messages": []}\n', "messages", "must be a list of messages"),
    "unknown role": (
        "r.jsonl",
        b'{"messages": [{"role": "narrator", "content": "a"}]}\n',
        "messages",
        "role 'narrator' is unknown",
    ),
    "no content": ("r.jsonl", b'{"messages": [{"role": "user"}]}\n', "messages", "messages[0] has no content"),
    "question last": (
        "r.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "messages",
        "messages ends with the user's turn",
    ),
    "answer first": (
        "r.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "messages",
        "the assistant answers before the user has asked",
    ),
    "number as label": ("r.jsonl", b'{"text": "a", "label": 1}\n', "classification", "Say what it means with `labels:"),
    "no label": ("r.jsonl", b'{"text": "a"}\n', "classification", "field 'label' is missing"),
    "no target": ("r.jsonl", b'{"source": "a"}\n', "translation", "field 'target' is missing"),
    "no completion": ("r.jsonl", b'{"prompt": "a"}\n', "prompt_completion", "field 'completion' is missing"),
}
BAD_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": (
        {"train": {"learnin_rate": 1.0}},
        "train.learnin_rate: unknown key. Did you mean 'learning_rate'?",
    ),
    "wrong type": ({"train": {"max_steps": "many"}}, "train.max_steps"),
    "missing data": ({"data": {"sources": [{"path": "nowhere.jsonl", "format": "alpaca"}]}}, "nowhere.jsonl"),
    "nothing to train": ({"adapter": {"attention": None, "mlp": None, "experts": None}}, "nothing would be trained"),
    "far beyond its positions": ({"data": {"max_length": 4096}}, "128 learned positions"),
    "beyond this base's positions": ({"data": {"max_length": 256}}, "128 learned positions"),
    "every row too long": ({"data": {"max_length": 16}}, "none of the 80 rows is left"),
    "one row too long": ({"data": {"max_length": 80, "overlong": "error"}}, "more than data.max_length 80"),
    "no such base": ({"base": {"model": "./nowhere"}}, "no such folder"),
    "unknown template": ({"data": {"template": "alpacca"}}, "template 'alpacca' is unknown"),
    "missing template": ({"data": {"template": "nowhere.jinja"}}, "nowhere.jinja: no such template"),
    "rank too large": ({"adapter": {"mlp": {"rank": 4096}}}, "adapter.mlp.rank: must be at most 1024"),
    "no rows of a language": (
        {"data": {"validation": 0.999999}},
        "leaves no training row",
    ),
    "expert that is not there": ({"adapter": {"experts": {"rank": 4, "select": [[0], [9]]}}}, "there is no expert 9"),
    "too few lists": ({"adapter": {"experts": {"rank": 4, "select": [[0]]}}}, "the base has 2 MoE layers"),
    "no selection file": ({"adapter": {"experts": {"rank": 4, "select": "no.json"}}}, "no.json: cannot be read"),
    "answers cannot be split": ({"data": {"overlong": "split"}}, "`split` cuts plain text only"),
    "float16 on a CPU": ({"base": {"dtype": "float16"}}, "float16 needs a GPU"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_refused(
    case: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    changes, expected = BAD_RECIPES[case]
    outcome = verb("train", recipe_file(**changes))
    check_refused(outcome, expected, tmp_path)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(
    case: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    text, expected = BAD_ROWS[case]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text, encoding="utf-8")
    changes = {"data": {"sources": [{"path": str(rows), "format": "alpaca"}]}}
    check_refused(verb("train", recipe_file(**changes)), expected, tmp_path)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(
    case: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    name, content, format, expected = BAD_FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    changes = {"data": {"sources": [{"path": str(file), "format": format}]}}
    check_refused(verb("train", recipe_file(**changes)), expected, tmp_path)


def test_there_are_enough_bad_files_and_recipes() -> None:
    assert len(BAD_ROWS) + len(BAD_FILES) + len(BAD_RECIPES) >= 60


def test_a_base_of_another_family_is_refused(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    other = tmp_path / "t5"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5"}')
    check_refused(verb("train", recipe_file(base={"model": str(other)})), "t5 … model_type … lola_v1", tmp_path)


def test_a_truncated_base_is_refused(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = verb("train", recipe_file(base={"model": str(broken)}))
    check_refused(outcome, "model.safetensors: truncated", tmp_path)


def test_a_base_without_tokenizer_is_refused(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    check_refused(verb("train", recipe_file(base={"model": str(bare)})), "no tokenizer", tmp_path)


def test_an_output_that_holds_a_run_is_refused_and_kept(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("mine")
    outcome = verb("train", recipe_file())
    assert outcome.code == 2
    assert "already holds a run" in outcome.err
    assert (run / "recipe.yaml").read_text() == "mine"


def test_an_adapter_of_another_shape_is_refused(verb: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> None:
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
    assert "Trained parameters" in outcome.out
    assert not (tmp_path / "run").exists()


def test_the_script_prints_one_message_and_ends_with_code_2(recipe_file: Callable[..., Path]) -> None:
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
    assert_says(outcome.err, expected)
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*partial*"))
