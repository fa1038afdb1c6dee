"""A whole run on a tiny base: what it learns, what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lola_ft
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.reports.metrics import read_metrics
from tests.pictures import drawing
from tests.training.conftest import recipe_dict


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    rows_file: Path,
    monkeypatch_module: pytest.MonkeyPatch,
) -> Path:
    """A finished run with every kind of adapter and its pictures, started with relative paths as a user would."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "base").symlink_to(tiny_base)
    (folder / "rows.jsonl").symlink_to(rows_file)
    recipe = {
        "base": {"model": "base", "dtype": "float32"},
        "adapter": {"attention": {"rank": 4}, "mlp": {"rank": 8}, "experts": {"rank": 4}, "dropout": 0.05},
        "router": {"mode": "tuned", "aux_loss": 0.01, "z_loss": 0.001},
        "data": {
            "sources": [{"path": "rows.jsonl", "format": "alpaca", "language_column": "language"}],
            "max_length": 128,
            "validation": 0.2,
        },
        "train": {
            "max_steps": 12,
            "micro_batch_size": 2,
            "grad_accum_steps": 2,
            "learning_rate": 0.01,
            "save_every": 3,
            "eval_every": 6,
        },
        "output": "run",
    }
    YAML().dump(recipe, folder / "recipe.yaml")
    monkeypatch_module.chdir(folder)
    with drawing():
        train(load_recipe("recipe.yaml"))
    return folder / "run"


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_run_learns_and_logs_every_step(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    step = next(line for line in lines if "loss" in line)
    assert {"step", "loss", "learning_rate", "tokens_per_s", "grad_norm", "aux_loss", "z_loss", "tokens"} <= set(step)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12, 12]


def test_run_folder_is_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "loss.png",
        "languages.png",
        "routing.png",
        "README.md",
    }
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-12", "step-9"]  # keep: 2
    assert load_recipe(run / "recipe.yaml").train.max_steps == 12


def test_manifest_says_what_happened(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["train"]["total"]["rows"] + manifest["data"]["validation"]["total"]["rows"] == 80
    assert set(manifest["data"]["train"]["languages"]) == {"en", "sw"}
    assert manifest["versions"]["transformers"]
    assert manifest["trained"]["router"] == {"tensors": 2, "parameters": 2 * 4 * 64}
    assert manifest["trained"]["experts"]["parameters"] == 2 * 4 * 2 * (4 * 64 + 4 * 128)
    assert manifest["base"]["parts"]["experts nf4"]["parameters"] == 2 * 4 * 2 * 64 * 128
    assert len(manifest["base"]["fingerprint"]) == 16
    assert manifest["results"]["steps"] == 12


def test_nothing_that_can_be_published_names_this_machine(run: Path) -> None:
    for path in run.rglob("*"):
        if path.suffix in {".json", ".md", ".yaml", ".jinja", ".jsonl", ".html"}:
            assert str(run.parent) not in path.read_text(encoding="utf-8"), path.name


def test_adapter_loads_here_and_in_stock_peft(run: Path, tiny_base: Path) -> None:
    ids = torch.tensor([[20, 30, 40, 50, 60]])
    ours = lola_ft.load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), run / "adapter")
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
        assert (base(ids).logits - ours(ids).logits).abs().max() > 0.1
    assert len(AutoTokenizer.from_pretrained(run / "adapter")) <= 320
    assert (run / "adapter" / "prompt_template.jinja").exists()


def test_every_adapter_tensor_was_trained(run: Path, tiny_base: Path) -> None:
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    gate = AutoModelForCausalLM.from_pretrained(tiny_base).transformer.h[1].moe.gate.weight
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        if "lora_B" in name:
            assert tensor.ne(0).any(), name  # B starts at zero
    assert not torch.equal(state["base_model.model.transformer.h.1.moe.gate.weight"], gate)


def test_checkpoints_hold_the_adapter_in_the_same_form(run: Path) -> None:
    last = load_file(run / "checkpoints" / "step-12" / "adapter" / "adapter_model.safetensors")
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    assert set(last) == set(final)
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_merge_of_the_run_equals_base_plus_adapter(run: Path, verb_module: Callable[..., int]) -> None:
    assert verb_module("merge", "run") == 0
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["applied"] == report["adapter_tensors"] > 0
    assert report["verification"]["max_logit_difference"] < 1e-4
    assert AutoTokenizer.from_pretrained(run / "merged").eos_token_id == 5


@pytest.fixture
def verb_module() -> Callable[..., int]:
    from lola_ft.cli import main

    def call(*arguments: str) -> int:
        try:
            main(list(arguments))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


@pytest.mark.slow
def test_micro_batches_add_up(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """One batch of 8 and 8 batches of 1 give the same step: the loss is divided by the whole step's labels."""
    adapters = []
    for name, micro, accumulate in (("one", 8, 1), ("eight", 1, 8)):
        changes = {
            "data": {"packing": False},
            "train": {"max_steps": 1, "micro_batch_size": micro, "grad_accum_steps": accumulate, "optimizer": "sgd"},
            "output": str(tmp_path / name),
        }
        train(load_recipe(recipe_file(**changes)))
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    one, eight = adapters
    assert any(tensor.ne(0).any() for name, tensor in one.items() if "lora_B" in name)
    for name in one:
        torch.testing.assert_close(
            one[name], eight[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def run_with_dropout(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe of `recipe_file` with dropout; read only."""
    folder = tmp_path_factory.mktemp("dropout")
    YAML().dump(recipe_dict(tiny_base, rows_file, folder / "run", adapter={"dropout": 0.1}), folder / "recipe.yaml")
    return train(load_recipe(folder / "recipe.yaml"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_recipe_same_adapter(
    checkpointing: bool, run_with_dropout: Path, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit by bit; recomputing activations in the backward pass changes memory only."""
    changes = {"adapter": {"dropout": 0.1}, "train": {"gradient_checkpointing": checkpointing}}
    train(load_recipe(recipe_file(**changes)))
    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (run_with_dropout, tmp_path / "run")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_may_train_only_the_router_of_an_unquantised_base(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {
        "base": {"quantization": "none"},
        "adapter": {"attention": None, "mlp": None, "experts": None},
        "router": {"mode": "tuned"},
    }
    train(load_recipe(recipe_file(**changes)))
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert set(state) == {f"base_model.model.transformer.h.{layer}.moe.gate.weight" for layer in (1, 3)}
