"""Whole runs of the families with experts: trained, planned to the byte, merged; and refused recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.errors import UserError
from lola_ft.families import FAMILIES
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.reports.metrics import read_metrics
from tests.families.conftest import write_recipe
from tests.families.moe import KINDS

CORRECTED = "deepseek_v3"


def recipe_for(kind: str, base: Path, rows: Path, folder: Path, **router: Any) -> Path:
    """Write a recipe with LoRA on all groups of a family, except the router, which is fully trained."""
    groups = KINDS[kind].groups
    adapter: dict[str, Any] = {group: {"rank": 4} for group in groups if group != "router"}
    if "mlp" not in groups:
        adapter["mlp"] = None
    return write_recipe(
        folder / "recipe.yaml", base, rows, adapter=adapter, train={"max_steps": 6, "save_every": 3}, router=router
    )


def _json_of(printed: str) -> dict[str, Any]:
    """Return the plan, which follows the output of `train` in this process."""
    found: dict[str, Any] = json.loads(printed[printed.index("\n{\n") :])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_merge_have_the_planned_sizes(
    kind: str, moe_bases: dict[str, Path], rows_file: Path, verb: Callable[..., Any], tmp_path: Path
) -> None:
    base = moe_bases[kind]
    router: dict[str, Any] = {"mode": "tuned", "z_loss": 0.001}
    if FAMILIES[kind].routing.balance:
        router["aux_loss"] = 0.01
    recipe = recipe_for(kind, base, rows_file, tmp_path, **router)
    run = train(load_recipe(recipe))
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    planned, manifest = _json_of(verb("plan", recipe, "--json").out), json.loads((run / "manifest.json").read_text())
    assert planned["weights"] == manifest["base"]["parts"]
    assert planned["adapter_file_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert planned["trained_parameters"] == sum(count["parameters"] for count in manifest["trained"].values())
    outcome = verb("merge", run, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    written = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert planned["merged_file_bytes"] == written


def test_a_balancing_loss_that_the_authors_lack_is_refused(
    moe_bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(CORRECTED, moe_bases[CORRECTED], rows_file, tmp_path, mode="tuned", aux_loss=0.01)
    with pytest.raises(UserError, match=r"router.aux_loss: DeepSeek-V3 balances its load without a loss"):
        train(load_recipe(recipe), dry_run=True)
