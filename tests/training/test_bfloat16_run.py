"""A whole run in bfloat16 on a CPU, where what is made for its matrix units is switched on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.model import layers
from lola_ft.recipe import load_recipe
from lola_ft.training import precision
from lola_ft.training.reports.metrics import read_metrics
from lola_ft.training.run import train


@pytest.mark.slow
def test_losses_are_those_of_float32_but_for_rounding(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(
        base={"dtype": "bfloat16"},
        train={"max_steps": 6, "log_every": 1, "learning_rate": 3e-3},
        router={"mode": "tuned"},
    )
    exact = _losses(train(load_recipe(recipe, [f"output={tmp_path / 'float32'}"])))
    used: list[str] = []

    def watched(name: str, function: Any) -> Any:
        return lambda *given: (used.append(name), function(*given))[1]

    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(layers, "cpu_attention", watched("attention", layers.cpu_attention))
    rounded = _losses(train(load_recipe(recipe, [f"output={tmp_path / 'bfloat16'}"])))
    assert set(used) == {"attention"}
    assert exact != rounded, "it did not compute in bfloat16"
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert exact[-1] < exact[0] - 0.1, "nothing was learned, so the losses could not differ"


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
