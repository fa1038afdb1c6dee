"""Plans of DPO and KTO: a pair is computed as two sequences; what autograd saves in the trainers' own loss."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoConfig, AutoTokenizer

from lola_ft import load_base
from lola_ft.adapters import add_adapter
from lola_ft.families import architecture_of
from lola_ft.planning.saved_for_backward import activations
from lola_ft.recipe import load_recipe
from lola_ft.training.base_model import adapter_settings
from lola_ft.training.dataset import prepare
from lola_ft.training.plan import job_of
from lola_ft.training.precision import choose_precision
from lola_ft.training.trainers.arguments import training_arguments
from lola_ft.training.trainers.preference import DpoTrainer, KtoTrainer
from tests.conftest import Outcome, write_rows
from tests.families.conftest import make_dense
from tests.grids import slow_but
from tests.planning.conftest import checkpointed
from tests.training.conftest import recipe_dict

NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
ROWS = {
    "dpo": [
        {"prompt": f"{NAMES[i]} " * 3, "chosen": NAMES[i], "rejected": NAMES[i - 3] * (1 + i % 3)} for i in range(8)
    ],
    "kto": [{"prompt": f"{NAMES[i]} " * 4, "completion": NAMES[i - 1] * 2, "label": i % 2 == 0} for i in range(8)],
}
FORMATS = {"dpo": "preference", "kto": "unpaired_preference"}


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """A recipe of an objective."""

    def write(objective: str, **changes: Any) -> Path:
        rows = write_rows(tmp_path / f"{objective}.jsonl", ROWS[objective])
        recipe = recipe_dict(tiny_base, rows, tmp_path / "run", objective=objective, **changes)
        recipe["data"]["sources"] = [{"path": str(rows), "format": FORMATS[objective], "language": "en"}]
        YAML().dump(recipe, tmp_path / "recipe.yaml")
        return tmp_path / "recipe.yaml"

    return write


GRID = [(kind, objective, way) for kind in ("lola", "gpt2", "bloom") for objective in ROWS for way in (False, True)]
FAST = [("lola", "dpo", False), ("lola", "kto", True), ("gpt2", "dpo", True), ("bloom", "kto", False)]


@pytest.mark.parametrize(("kind", "objective", "checkpointing"), slow_but(FAST, GRID))
def test_saved_tensors_are_as_planned(
    kind: str, objective: str, checkpointing: bool, recipe_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = tiny_base if kind == "lola" else make_dense(tmp_path / "dense", kind)
    own = {} if kind == "lola" else {"base": {"model": str(base)}, "adapter": {"experts": None}}
    train = {"micro_batch_size": 4, "gradient_checkpointing": checkpointing}
    recipe = load_recipe(recipe_of(objective, train=train, **own))
    tokenizer, device = AutoTokenizer.from_pretrained(base), torch.device("cpu")
    data = prepare(recipe.data, tokenizer, 0)
    model: Any = add_adapter(load_base(base, "nf4", "float32", "cpu", quiet=True), adapter_settings(recipe))
    arguments = training_arguments(recipe, tmp_path, choose_precision("float32", device), device, 1, evaluate=False)
    kind: Any = {"dpo": DpoTrainer, "kto": KtoTrainer}[objective]
    trainer = kind(model=model, args=arguments, train_dataset=data.mix.dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    if checkpointing:
        checkpointed(model)
    frozen = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_mask = tensor.dtype == torch.bool and tensor.ndim == 4  # held in any case
        if tensor.untyped_storage().data_ptr() not in frozen and not is_mask:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(model.train(), batch)
    job = replace(job_of(recipe, architecture_of(model.config), "cpu"), length=batch["input_ids"].shape[1])
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert activations(job).saved == pytest.approx(real, rel=0.05)  # as in test_planning_activations.py


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_bases_dropouts_are_not_planned(objective: str, recipe_of: Callable[..., Path], tiny_base: Path) -> None:
    recipe = load_recipe(recipe_of(objective))
    config = AutoConfig.from_pretrained(tiny_base)
    without = activations(job_of(recipe, architecture_of(config), "cpu"))
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.1
    assert activations(job_of(recipe, architecture_of(config), "cpu")) == without
    answers = recipe.model_copy(update={"objective": "sft"})
    assert activations(job_of(answers, architecture_of(config), "cpu")).saved > without.saved


def test_a_pair_is_as_long_as_its_longer_answer(
    recipe_of: Callable[..., Path], verb: Callable[..., Outcome], tiny_base: Path
) -> None:
    outcome = verb("plan", recipe_of("dpo", train={"max_steps": None, "epochs": 1.0}), "--json")
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    data = prepare(load_recipe(recipe_of("dpo")).data, AutoTokenizer.from_pretrained(tiny_base), 0)
    rows = data.train.dataset
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    assert planned["epoch"] == {"sequences": 8, "tokens": data.mix.tokens, "longest": longest}
    assert planned["steps"] == 2
    assert "2 pairs of 2 x" in verb("plan", recipe_of("dpo")).out


def test_no_change_that_kto_refuses_is_suggested(recipe_of: Callable[..., Path], verb: Callable[..., Outcome]) -> None:
    path = recipe_of("kto", train={"micro_batch_size": 2, "gradient_checkpointing": True})
    needed = json.loads(verb("plan", path, "--gpu", "8GB", "--json").out)["peak_bytes"]
    suggestion = json.loads(verb("plan", path, "--gpu", str(needed - 1), "--json").out)["suggestion"]
    assert load_recipe(path, suggestion["overrides"]).train.micro_batch_size == 2
