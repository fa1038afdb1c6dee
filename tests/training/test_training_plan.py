"""`lola-ft plan`: from the config alone, with the data's numbers, as JSON, and what to paste behind a recipe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig
from lola_ft.recipe import load_recipe
from lola_ft.training.dataset import prepare
from lola_ft.training.plan import advice, job_of


def test_a_plan_needs_only_the_config(
    recipe_file: Callable[..., Path], tmp_path: Path, verb: Callable[..., Any]
) -> None:
    """LOLA at its full size, of which no weight is here."""
    LolaConfig().save_pretrained(tmp_path / "lola")
    recipe = recipe_file(base={"model": str(tmp_path / "lola"), "dtype": "bfloat16"})
    outcome = verb("plan", recipe, "--gpu", "8GB", "--no-data")
    assert outcome.code == 0, outcome.err
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "work space", "context"):
        assert part in outcome.out
    assert "It fits" in outcome.out
    planned = json.loads(verb("plan", recipe, "--gpu", "8GB", "--no-data", "--json").out)
    assert sum(count["parameters"] for count in planned["weights"].values()) == 7_459_827_712
    assert planned["peak_bytes"] == sum(planned["parts"].values())
    assert sum(planned["merged_file_bytes"].values()) == pytest.approx(29.84e9, rel=1e-3)
    assert planned["suggestion"] is None


def test_overrides_that_are_suggested_make_it_fit(recipe_file: Callable[..., Path], verb: Callable[..., Any]) -> None:
    recipe = recipe_file(train={"micro_batch_size": 32, "grad_accum_steps": 1})
    whole = json.loads(verb("plan", recipe, "--gpu", "100GB", "--json").out)
    assert whole["fits"] is True
    limit = whole["peak_bytes"] - whole["parts"]["activations"]  # bytes
    outcome = verb("plan", recipe, "--gpu", str(limit))
    assert outcome.code == 0
    overrides = outcome.out.splitlines()[-1].split()
    assert overrides[0] == "train.gradient_checkpointing=true"
    again = json.loads(verb("plan", recipe, *overrides, "--gpu", str(limit), "--json").out)
    assert again["fits"] is True
    suggested = json.loads(verb("plan", recipe, "--gpu", str(limit), "--json").out)["suggestion"]
    assert suggested["overrides"] == overrides
    assert suggested["peak_bytes"] == again["peak_bytes"]


def test_steps_and_tokens_are_those_of_the_data(
    recipe_file: Callable[..., Path], tiny_base: Path, verb: Callable[..., Any]
) -> None:
    from transformers import AutoTokenizer

    path = recipe_file(data={"packing": False}, train={"max_steps": None, "epochs": 2.0})
    planned = json.loads(verb("plan", path, "--json").out)
    recipe = load_recipe(path)
    mixed = prepare(recipe.data, AutoTokenizer.from_pretrained(tiny_base), 0).mix
    longest = max(len(ids) for ids in mixed.dataset["input_ids"])
    assert planned["epoch"] == {"sequences": 80, "tokens": mixed.tokens, "longest": longest}
    assert planned["steps"] == 40
    assert planned["tokens_per_step"] == round(4 * mixed.tokens / 80)
    assert longest < recipe.data.max_length, "the plan is for the rows that there are"
    assert job_of(recipe, architecture_of(LolaConfig.from_pretrained(tiny_base)), "cpu", longest).length == longest


def test_mistakes_are_one_message_each(
    recipe_file: Callable[..., Path], tmp_path: Path, verb: Callable[..., Any]
) -> None:
    outcome = verb("plan", recipe_file(), "--gpu", "8 elephants")
    assert outcome.code == 2
    assert "'8 elephants' is not a size of memory" in outcome.err
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = verb("plan", recipe_file(base={"model": str(empty)}))
    assert outcome.code == 2
    assert "config.json" in outcome.err
    outcome = verb("plan", recipe_file(adapter={"experts": {"rank": 4, "select": [[0], [1], [2]]}}), "--no-data")
    assert outcome.code == 2
    assert "adapter.experts.select" in outcome.err


def test_a_base_without_tokenizer_is_planned_without_data(
    recipe_file: Callable[..., Path], tiny_base: Path, tmp_path: Path, verb: Callable[..., Any]
) -> None:
    shutil.copytree(tiny_base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.safetensors"))
    outcome = verb(
        "plan", recipe_file(base={"model": str(tmp_path / "bare")}, train={"max_steps": None, "epochs": 1.0})
    )
    assert outcome.code == 0, outcome.err
    assert "holds no tokenizer" in outcome.out
    assert "An unknown number of steps" in outcome.out


def test_advice_names_the_parts_and_a_smaller_setting(recipe_file: Callable[..., Path], tiny_base: Path) -> None:
    recipe = load_recipe(recipe_file(train={"micro_batch_size": 4096, "grad_accum_steps": 1}))
    lines = advice(recipe, architecture_of(LolaConfig.from_pretrained(tiny_base))).splitlines()
    assert lines[0] == "4096 rows of 128 tokens, packed need about:"
    assert lines[-1].split()[0] == "train.gradient_checkpointing=true"
