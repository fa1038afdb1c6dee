"""Recipes for runs of a tiny base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML


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
