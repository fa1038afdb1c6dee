"""`lola-ft plan` for dense baselines, and the advice after running out of memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BloomConfig

from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.recipe import load_recipe
from lola_ft.training.dataset import prepare
from lola_ft.training.plan import advice
from tests.families.conftest import write_recipe

KINDS = ("gpt2", "bloom")


@pytest.mark.parametrize("kind", KINDS)
def test_the_verb_plans_a_dense_recipe(
    kind: str, dense_recipe: Callable[..., Path], verb: Callable[..., Any], dense_bases: dict[str, Path]
) -> None:
    recipe = dense_recipe(kind, train={"micro_batch_size": 16, "gradient_checkpointing": False, "max_steps": None})
    outcome = verb("plan", recipe, "--gpu", "100GB")
    assert outcome.code == 0, outcome.err
    assert "It fits" in outcome.out
    assert ("Rows are not packed" in outcome.err) == (kind == "bloom"), "the note is not among the numbers"
    whole = json.loads(verb("plan", recipe, "--gpu", "100GB", "--json").out)
    assert whole["peak_bytes"] == sum(whole["parts"].values())
    assert whole["weights"]["attention nf4"]["parameters"] == 2 * 4 * 64 * 64
    prepared = prepare(load_recipe(recipe).data, AutoTokenizer.from_pretrained(dense_bases[kind]), 0).mix
    assert (whole["epoch"]["sequences"], whole["epoch"]["tokens"]) == (len(prepared.dataset), prepared.tokens)
    size = (dense_bases[kind] / "model.safetensors").stat().st_size
    assert sum(whole["merged_file_bytes"].values()) == pytest.approx(size, abs=500)  # another writer's header
    short = str(whole["peak_bytes"] - whole["parts"]["activations"])
    suggestion = json.loads(verb("plan", recipe, "--gpu", short, "--json").out)["suggestion"]
    assert suggestion["overrides"][0] == "train.gradient_checkpointing=true"
    again = json.loads(verb("plan", recipe, *suggestion["overrides"], "--gpu", short, "--json").out)
    assert (again["fits"], again["peak_bytes"]) == (True, suggestion["peak_bytes"])


def test_a_recipe_that_training_refuses_is_not_planned(
    dense_recipe: Callable[..., Path], verb: Callable[..., Any]
) -> None:
    outcome = verb("plan", dense_recipe("gpt2", adapter={"experts": {"rank": 4}}))
    assert (outcome.code, "which has no experts" in outcome.err) == (2, True)
    outcome = verb("plan", dense_recipe("bloom"), "data.packing=true")
    assert (outcome.code, "cannot keep packed documents apart" in outcome.err) == (2, True)


def test_the_bundled_recipe_is_planned_from_a_config_alone(tmp_path: Path, verb: Callable[..., Any]) -> None:
    """BLOOM with 1.1 billion parameters, without its weights."""
    BloomConfig(vocab_size=250880, hidden_size=1536, n_layer=24, n_head=16).save_pretrained(tmp_path / "bloom")
    where = f"base.model={tmp_path / 'bloom'}"
    outcome = verb("plan", "recipes/baseline_dense.yaml", where, "--gpu", "8GB", "--no-data", "--json")
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    assert sum(count["parameters"] for count in planned["weights"].values()) == 1_065_314_304
    assert planned["trained_parameters"] == 24 * 16 * (2 * (1536 + 4 * 1536) + (1536 + 3 * 1536) + 2 * 1536)


@pytest.mark.parametrize("kind", KINDS)
def test_advice_names_the_parts_and_a_smaller_setting(
    kind: str, dense_bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    train = {"micro_batch_size": 4096, "gradient_checkpointing": False}
    file = write_recipe(tmp_path / "recipe.yaml", dense_bases[kind], rows_file, train=train, data={"packing": False})
    lines = advice(load_recipe(file), open_config(dense_bases[kind])[1]).splitlines()
    assert lines[0] == "4096 rows of 128 tokens need about:"
    assert [line.split()[0] for line in lines[1:5]] == ["weights", "adapter", "gradients", "optimizer"]
    assert lines[-1].split()[0] == "train.gradient_checkpointing=true"
