"""Runs of a tiny base, and a way to run verbs in this process as the command line would."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lola_ft.cli import main


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `lola-ft …` in this process."""

    def run(*arguments: str) -> Outcome:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def recipe_dict(model: Path, rows: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A small, quick recipe; `changes` replace whole sections' keys, such as train={'max_steps': 2}."""
    recipe: dict[str, Any] = {
        "base": {"model": str(model), "quantization": "nf4", "dtype": "float32"},
        "adapter": {
            "attention": {"rank": 4},
            "mlp": {"rank": 8},
            "experts": {"rank": 4},
            "alpha": 8,
            "dropout": 0.0,
        },
        "data": {
            "sources": [{"path": str(rows), "format": "alpaca", "language_column": "language"}],
            "max_length": 128,
        },
        "train": {
            "max_steps": 3,
            "micro_batch_size": 2,
            "grad_accum_steps": 2,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
            "save_every": 0,
        },
        "output": str(folder),
    }
    for section, keys in changes.items():
        recipe[section] = recipe.get(section, {}) | keys if isinstance(keys, dict) else keys
    return recipe


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_base: Path, rows_file: Path) -> Callable[..., Path]:
    """Write a recipe for the tiny base; its run goes to `tmp_path/run`."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        YAML().dump(recipe_dict(tiny_base, rows_file, tmp_path / "run", **changes), path)
        return path

    return write
