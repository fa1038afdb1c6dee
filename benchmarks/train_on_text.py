"""A short training run on a file of texts, for several benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lola_ft.recipe import load_recipe
from lola_ft.training import train


def train_on_text(
    base: Path,
    text: Path,
    out: Path,
    adapter: dict[str, Any],
    args: argparse.Namespace,
    quantization: str = "nf4",
    **data: Any,
) -> Path:
    """Train an adapter on texts and return the run's folder.

    Args:
        text: JSONL with `text` and `language`.
        adapter: Groups of the recipe's `adapter` section.
        args: Has `rank`, `steps` and `rate`.
        data: Further keys of the recipe's `data` section.
    """
    recipe = {
        "base": {"model": str(base), "dtype": "float32", "quantization": quantization},
        "adapter": adapter | {"alpha": 2 * args.rank, "dropout": 0.0},
        "data": {
            "sources": [{"path": str(text), "format": "text", "language_column": "language"}],
            "max_length": 256,
            **data,
        },
        "train": {
            "max_steps": args.steps,
            "micro_batch_size": 8,
            "grad_accum_steps": 1,
            "learning_rate": args.rate,
            "gradient_checkpointing": False,
            "save_every": 0,
        },
        "output": str(out),
    }
    file = out.with_suffix(".yaml")
    YAML().dump(recipe, file)
    return train(load_recipe(file))
