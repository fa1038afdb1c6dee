"""Runs with what a recipe may ask of the adapter beyond plain LoRA: learned, saved, loadable, merged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from ruamel.yaml import YAML

import lola_ft
from lola_ft.adapters.on_disk import read_adapter
from lola_ft.recipe import load_recipe
from lola_ft.training import processes, train
from lola_ft.training.precision import choose_precision
from lola_ft.training.reports.metrics import read_metrics
from lola_ft.training.trainers.arguments import training_arguments
from lola_ft.training.trainers.run_trainer import raise_rate_of_b
from tests.tiny import TINY

OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"attention": {"rank": 4}, "experts": {"rank": 2}, "variant": "dora"}},
    "router with LoRA": {
        "adapter": {"experts": {"rank": 2, "alpha": 8.0}},
        "router": {"mode": "lora", "rank": 4, "aux_loss": 0.01},
    },
    "some experts": {"adapter": {"experts": {"rank": 4, "select": [[0, 2], [3]]}, "biases": True}},
    "loftq": {"adapter": {"attention": {"rank": 4}, "experts": {"rank": 2}, "init": "loftq"}},
    "norms and biases": {"adapter": {"mlp": {"rank": 2, "dropout": 0.2}, "norms": True, "biases": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_with_each_option_learns_and_merges(
    option: str, recipe_file: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(train={"max_steps": 8, "lora_plus_ratio": 2.0}, **{"adapter": {}} | OPTIONS[option])
    text = YAML().load(recipe)
    text["adapter"] = OPTIONS[option]["adapter"] | {"alpha": 8.0}
    YAML().dump(text, recipe)
    run = train(load_recipe(recipe))
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    if option == "some experts":
        weights = read_adapter(run / "adapter").weights(TINY)
        names = [name for name in (*weights.pairs, *weights.trained) if ".experts." in name]
        assert {(name.split(".")[2], name.split(".")[5]) for name in names} == {("1", "0"), ("1", "2"), ("3", "3")}
        assert len(weights.biases()) == 3 * 2 + 4 * (2 + 2) + 2 * 2 + 1
    model = lola_ft.load_adapter(lola_ft.load_base(tiny_base, "nf4", "float32", "cpu", quiet=True), run / "adapter")
    report = lola_ft.merge(tiny_base, run / "adapter", tmp_path / "merged", rounding="nf4")
    merged = lola_ft.load_base(tmp_path / "merged", None, "float32", "cpu", quiet=True)
    ids = torch.randint(6, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert report.applied == report.adapter_tensors


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    model = torch.nn.ModuleDict(
        {"lora_A": torch.nn.Linear(3, 2), "x": torch.nn.ModuleDict({"lora_B": torch.nn.Linear(2, 3)})}
    )
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": list(named.values()), "weight_decay": 0.1}], lr=0.5)
    raise_rate_of_b(optimizer, model, 16.0)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in named.items()} == {
        "lora_A.weight": (0.5, 0.1),
        "lora_A.bias": (0.5, 0.1),
        "x.lora_B.weight": (8.0, 0.1),
        "x.lora_B.bias": (8.0, 0.1),
    }


def test_the_environment_stays_as_it_is(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """accelerate would empty it for a moment while other threads may read it; its own settings decide nothing."""

    def emptied() -> None:
        raise AssertionError("the environment was emptied")

    monkeypatch.setattr("accelerate.utils.environment.clear_environment", emptied)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ)
    train(load_recipe(recipe_file(train={"max_steps": 1})))
    assert dict(os.environ) == before
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["base"]["dtype"] == "float32"
    handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    processes.leave_environment(handler)
    assert handler.to_kwargs() == {"find_unused_parameters": True, "broadcast_buffers": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerates_precision_does_not_count(
    dtype: str, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU nothing is computed in two precisions."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    cpu, recipe = torch.device("cpu"), load_recipe(recipe_file(base={"dtype": dtype}))
    arguments = training_arguments(recipe, tmp_path, choose_precision(dtype, cpu), cpu, steps=1, evaluate=False)
    assert arguments.mixed_precision == "no"
