"""The recipes of other mixtures fit the GPU that they name, by the exact shapes of the base that they name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from lola_ft.recipe.bundled import find_recipe
from tests.grids import slow_but

# Sizes as in each base's config on the Hub; parameters as its authors give them.
BASES: dict[str, tuple[PretrainedConfig, float, str]] = {
    "instruct_olmoe": (OlmoeConfig(intermediate_size=1024, max_position_embeddings=4096), 6.9e9, "12GB"),
    "instruct_qwen3_moe": (
        Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, norm_topk_prob=True, max_position_embeddings=40960),
        30.5e9,
        "24GB",
    ),
    "instruct_mixtral": (MixtralConfig(max_position_embeddings=32768), 46.7e9, "48GB"),
}


@pytest.mark.parametrize("name", slow_but([], BASES))
def test_a_recipe_fits_the_gpu_that_it_names(name: str, verb: Callable[..., Any], tmp_path: Path) -> None:
    config, parameters, gpu = BASES[name]
    config.save_pretrained(tmp_path / "base")
    recipe = find_recipe(name)
    assert f"--gpu {gpu}\n" in recipe.text
    overrides = (f"base.model={tmp_path / 'base'}", "--no-data", "--json")
    planned = json.loads(verb("plan", recipe.path, *overrides, "--gpu", gpu).out)
    assert planned["fits"] is True
    assert sum(planned["merged_file_bytes"].values()) / 4 == pytest.approx(
        parameters, rel=0.01
    )  # a config alone means float32
    half = json.loads(verb("plan", recipe.path, *overrides, "--gpu", str(planned["peak_bytes"] // 2)).out)
    assert half["fits"] is False
